"""What the endpoints answer, read from the workers' files; no engine is asked, no step waits.

Dimension legend: N requests, L layers of the model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from flux_vllm.live.request_ids import RequestName
from flux_vllm.metrics.journal import CAPACITY, WorkerRoutes, read_journals
from flux_vllm.metrics.savings import read_key_reading
from flux_vllm.router.route import Route

MOST_REQUESTS = 256

_LETTERS = np.empty(len(Route), dtype="S1")
for _route, _letter in ((Route.UNDECIDED, b"-"), (Route.SPARSE, b"S"), (Route.FULL, b"F")):
    _LETTERS[_route - Route.UNDECIDED] = _letter


def live_snapshot(directory: Path, limit: int) -> dict[str, Any]:
    """Describe the engines that run and their latest requests, newest first.

    Args:
        directory: shared with the workers.
        limit: most requests to list.

    Returns: dict; without request ids, which are for those who know them.
    """
    workers = read_journals(directory, limit)
    live = [worker for worker in workers if worker.is_live]
    requests: list[dict[str, Any]] = [
        {"engine": worker.name, "number": number} | shown
        for worker in live
        for number, shown in zip(
            worker.records["number"].tolist(), _requests(worker.records), strict=True
        )
    ]
    requests.sort(key=lambda request: request["time"], reverse=True)
    return {
        "engines": [
            {"id": worker.name} | worker.about | {"requests": _total(worker)} for worker in live
        ],
        "ended_engines": len(workers) - len(live),
        "kv_reading": {
            phase: {
                "attended_tokens": int(reading.attended_tokens),
                "context_tokens": int(reading.context_tokens),
                "saved": reading.saved,
            }
            for phase, reading in read_key_reading(directory).items()
        },
        "requests": requests[:limit],
    }


def routes_of_request(directory: Path, name: str) -> list[dict[str, Any]]:
    """Find the routes that a client's request got.

    Args:
        directory: shared with the workers.
        name: the response's `id`, or the X-Request-Id that the client sent.

    Returns: list of dict, one for each prompt and choice, in that order; empty where nothing is
        known under this name.
    """
    wanted = RequestName(name)
    found = []
    for worker in read_journals(directory, CAPACITY, lambda name: wanted.part(name) is not None):
        model = {"model_name": worker.about["model_name"]}
        for record, shown in zip(worker.records, _requests(worker.records), strict=True):
            part = wanted.part(record["request_id"])
            if part is not None:  # else overwritten since it was chosen
                found.append({"prompt": part.prompt, "choice": part.choice} | model | shown)
    return sorted(found, key=lambda shown: (shown["prompt"], shown["choice"], shown["time"]))


def _requests(records: np.ndarray) -> list[dict[str, Any]]:
    """Show [N] records: routes as one letter a layer, P(FULL) to three digits or NaN."""
    routes = np.ascontiguousarray(_LETTERS[records["routes"] - Route.UNDECIDED])
    letters = routes.view(f"S{routes.shape[1]}")[:, 0].tolist()
    probability = records["full_probability"].astype(np.float64).round(3).tolist()
    return [
        {
            "time": time,
            "prompt_tokens": prompt_tokens,
            "routes": route_letters.decode(),
            "full_probability": p_full,
        }
        for time, prompt_tokens, route_letters, p_full in zip(
            records["time"].round(3).tolist(),
            records["prompt_tokens"].tolist(),
            letters,
            probability,
            strict=True,
        )
    ]


def _total(worker: WorkerRoutes) -> int:
    return int(worker.records["number"][0]) if len(worker.records) else 0
