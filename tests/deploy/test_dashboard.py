"""Grafana's dashboard: the committed file is what the code makes, and asks only what is counted.

Oracle: the metrics' names, read from the source that counts them; vLLM's from its own source.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy.grafana import dashboard
from flux_vllm.metrics.directory import LIVE_PLUGIN

FLUX = Path(dashboard.__file__).parents[2] / "flux_vllm"


def expressions() -> list[str]:
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metric_names(pattern: str, texts: list[str]) -> set[str]:
    """Find metrics without their samples' endings."""
    found = {name for text in texts for name in re.findall(pattern, text)}
    return {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in found}


def test_file_is_what_the_code_makes():
    assert dashboard.FILE.read_text() == dashboard.build(), (
        "run: python -m deploy.grafana.dashboard"
    )


def test_every_metric_of_flux_is_shown():
    sources = [file.read_text() for file in (FLUX / "metrics").glob("*.py")]
    counted = metric_names(r'"(flux_[a-z_]+)"', sources) - {LIVE_PLUGIN}
    assert metric_names(r"\b(flux_\w+)\{", expressions()) == counted


@pytest.mark.vllm
def test_metrics_of_vllm_exist():
    package = Path(find_spec("vllm").origin).parent
    source = (package / "v1" / "metrics" / "loggers.py").read_text()
    defined = set(re.findall(r'name="(vllm:[a-z_]+)"', source))
    asked = metric_names(r"(vllm:\w+)\{", expressions())
    assert len(asked) >= 6
    assert asked <= defined


def test_every_query_follows_the_variables():
    for text in expressions():
        for labels in re.findall(r"\{([^}]*)\}", text):
            assert labels.startswith('model_name=~"$model",instance=~"$instance"'), text


def test_panels_do_not_overlap():
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
