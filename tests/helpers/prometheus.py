"""A real Prometheus with the project's configuration and rules, asked through its HTTP API."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from demo.server import _free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCRAPE_SECONDS = 1
Samples = list[tuple[dict[str, str], float]]


class Prometheus:
    """`prometheus` with deploy/prometheus/prometheus.yaml; only targets and intervals differ.

    Args:
        folder: for its configuration, data and log.
        servers: URLs to scrape.
    """

    def __init__(self, folder: Path, servers: Sequence[str]) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
        interval = f"{SCRAPE_SECONDS}s"
        config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
        (scrape,) = config["scrape_configs"]
        scrape["static_configs"] = [{"targets": [url.split("//")[1] for url in servers]}]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(DEPLOY / "prometheus" / name, folder)
        self._folder = folder
        self._log = (folder / "log").open("wb")
        address = f"127.0.0.1:{_free_port()}"
        self.url = f"http://{address}"
        self._command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]

    def __enter__(self) -> "Prometheus":
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self.wait(lambda: self.query("up == 1"), "its first scrape")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def query(self, expression: str) -> Samples:
        """Evaluate now. Returns: (labels, value) a series."""
        result = self._get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        """Evaluate to the one series that there must be."""
        ((_, value),) = self.query(expression)
        return value

    def query_range(
        self, expression: str, begin: float, end: float, step: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Evaluate over time, in Unix seconds. Returns: (labels, [(time, value)]) a series."""
        result = self._get("query_range", query=expression, start=begin, end=end, step=step)
        return [
            (series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in result["result"]
        ]

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 30) -> None:
        """Wait until a condition holds.

        Raises: TimeoutError: it does not within `seconds`.
        """
        begin = time.monotonic()
        while True:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() - begin > seconds or self._process.poll() is not None:
                log = (self._folder / "log").read_text()[-2000:]
                raise TimeoutError(f"Prometheus: expected {what} within {seconds} s\n{log}")
            time.sleep(0.2)

    def _get(self, path: str, **parameters: Any) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        body = answer.json() if answer.status_code < 500 else answer.raise_for_status()
        assert body["status"] == "success", (parameters, body)
        return body["data"]
