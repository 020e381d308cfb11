"""The vLLM endpoint plugin: live page and request view on vLLM's own API server.

vLLM attaches it only where `VLLM_PLUGINS` names it. It reads the workers' files alone.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, HTTPException, Query, Response

from flux_vllm.live.snapshot import MOST_REQUESTS, live_snapshot, routes_of_request
from flux_vllm.metrics.directory import metrics_directory

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ASSETS = {
    "/flux": ("page.html", "text/html"),
    "/flux/page.css": ("page.css", "text/css"),
    "/flux/page.js": ("page.js", "text/javascript"),
}


class LivePlugin:
    """Satisfies vLLM's `EndpointPlugin` (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "flux_live"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes to vLLM's application."""
        for path, (file, media_type) in _ASSETS.items():
            app.add_api_route(path, _asset(file, media_type), include_in_schema=False)
        app.add_api_route("/flux/routes.json", recent_routes)
        # Under /v1, so that the key which the request needed is needed for its view too.
        app.add_api_route("/v1/flux/requests/{name:path}", request_routes)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Need nothing of the engine."""


# Coroutines, though they wait for nothing: a thread costs these few milliseconds another one.
async def recent_routes(
    limit: Annotated[int, Query(ge=1, le=MOST_REQUESTS)] = MOST_REQUESTS,
) -> Response:
    """Give the engines, what they saved, and the routes of their latest requests."""
    return _json(live_snapshot(_directory(), limit))


async def request_routes(name: str) -> Response:
    """Give the routes of one request, by its response's `id` or the X-Request-Id sent with it."""
    found = routes_of_request(_directory(), name)
    if not found:
        raise HTTPException(
            404,
            f"flux: expected the id of a request whose routes were decided, found no routes for "
            f"{name!r}. Give the response's `id` or the X-Request-Id sent; ask once the first "
            "token has arrived and soon after, since only the latest requests are kept; routes are "
            "decided once a request is longer than sinks and window together",
        )
    return _json({"id": name, "requests": found})


def _directory() -> Path:
    directory = metrics_directory()
    if directory is None or not directory.is_dir():
        raise HTTPException(
            503,
            "flux: expected an engine that serves with flux, found none; start the server with "
            "--attention-backend flux",
        )
    return directory


def _json(value: object) -> Response:
    # msgspec writes NaN as null, and is ten times faster than the standard library here.
    return Response(
        msgspec.json.encode(value),
        media_type="application/json",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


def _asset(file: str, media_type: str) -> Any:
    content = (files("flux_vllm.live") / file).read_bytes()

    def asset() -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return asset
