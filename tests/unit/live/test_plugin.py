"""The endpoint plugin in vLLM's own application: when it is there, what it says, who may ask.

Oracle: vLLM's plugin loader, its authentication and its error handling, run as they are. Pinned:
nothing is served unless VLLM_PLUGINS names `flux_live`; the general plugin's name does not enable
it; the page loads nothing from elsewhere.
"""

import re
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from flux_vllm.live.plugin import LivePlugin
from flux_vllm.metrics.journal import RouteJournal

pytestmark = pytest.mark.vllm

ABOUT = {"model_name": "m", "policy": "full", "num_layers": 3, "routed_layers": [0, 2]}
PATHS = ("/flux", "/flux/page.css", "/flux/page.js", "/flux/routes.json")


def application(
    monkeypatch: pytest.MonkeyPatch, plugins: str | None, api_key: str | None = None
) -> TestClient:
    """Make vLLM's application as far as plugins, errors and keys go."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    if api_key is not None:
        app.add_middleware(AuthenticationMiddleware, tokens=[api_key])
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def journal(folder: Path) -> RouteJournal:
    made = RouteJournal(folder, ABOUT, 3)
    routes, p_full = np.array([1, -1, 0], np.int8), np.array([0.75, np.nan, 0.25], np.float32)
    made.append("cmpl-known-0-0123abcd", 17, routes, p_full)
    return made


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, journal: RouteJournal) -> TestClient:
    return application(monkeypatch, "flux,flux_live")


def test_it_satisfies_vllms_protocol() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(LivePlugin(), EndpointPlugin)


def test_entry_points_have_names_of_their_own() -> None:
    (live,) = entry_points(group="vllm.endpoint_plugins", name="flux_live")
    assert live.load() is LivePlugin
    assert LivePlugin.name == live.name
    assert not entry_points(group="vllm.general_plugins", name="flux_live")


@pytest.mark.parametrize("plugins", [None, "", "flux", "other"])
def test_not_there_unless_named(monkeypatch, folder: Path, plugins: str | None) -> None:
    client = application(monkeypatch, plugins)
    for path in (*PATHS, "/v1/flux/requests/cmpl-known"):
        assert client.get(path).status_code == 404
    assert not any("flux" in path for path in client.app.openapi()["paths"])  # type: ignore[attr-defined]


def test_routes_json(client: TestClient) -> None:
    answer = client.get("/flux/routes.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    (request,) = answer.json()["requests"]
    assert request["routes"] == "F-S"
    assert request["full_probability"] == [0.75, None, 0.25]
    assert "known" not in answer.text


@pytest.mark.parametrize("limit", ["0", "257", "-1", "x"])
def test_limit_is_checked(client: TestClient, limit: str) -> None:
    answer = client.get("/flux/routes.json", params={"limit": limit})
    assert answer.status_code in (400, 422)
    assert "limit" in answer.text


def test_request_view(client: TestClient) -> None:
    answer = client.get("/v1/flux/requests/cmpl-known")
    assert answer.status_code == 200
    assert answer.json()["id"] == "cmpl-known"
    (request,) = answer.json()["requests"]
    assert (request["prompt"], request["choice"], request["routes"]) == (0, 0, "F-S")
    assert client.get("/v1/flux/requests/known").json()["requests"] == [request]


@pytest.mark.parametrize("name", ["cmpl-unknown", "a/b", "cmpl-known-0-0123abcd", "%2e%2e"])
def test_unknown_request(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/flux/requests/{name}")
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert "expected the id of a request whose routes were decided" in message
    assert "found no routes for" in message


def test_names_with_slashes_and_spaces(client: TestClient, journal: RouteJournal) -> None:
    journal.append("chatcmpl-team/a b-0123abcd", 1, np.zeros(3, np.int8), np.zeros(3, np.float32))
    answer = client.get("/v1/flux/requests/team%2Fa%20b")
    assert [request["routes"] for request in answer.json()["requests"]] == ["SSS"]


@pytest.mark.parametrize("path", ["/flux/routes.json", "/v1/flux/requests/cmpl-known"])
def test_without_a_flux_engine(monkeypatch, folder: Path, path: str) -> None:
    monkeypatch.delenv("FLUX_METRICS_DIR")
    answer = application(monkeypatch, "flux,flux_live").get(path)
    assert answer.status_code == 503
    assert "--attention-backend flux" in answer.json()["error"]["message"]


def test_a_key_guards_the_request_view_alone(monkeypatch, journal: RouteJournal) -> None:
    client = application(monkeypatch, "flux,flux_live", api_key="k")
    with_key: dict[str, Any] = {"headers": {"Authorization": "Bearer k"}}
    assert client.get("/v1/flux/requests/cmpl-known").status_code == 401
    assert client.get("/v1/flux/requests/cmpl-known", **with_key).status_code == 200
    for path in PATHS:  # as vLLM's own /metrics
        assert client.get(path).status_code == 200


def test_only_reading_is_allowed(client: TestClient) -> None:
    for path in (*PATHS, "/v1/flux/requests/cmpl-known"):
        assert client.post(path).status_code == 405


def test_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page, css, js = (client.get(path) for path in PATHS[:3])
    references = re.findall(r"""(?:href|src)=["']([^"']+)""", page.text)
    own = {"flux/page.css", "flux/page.js", "flux/routes.json", "data:,"}
    assert set(references) <= own
    # Relative to /flux, so that they hold behind a proxy's --root-path too.
    assert {str(httpx.URL("http://host/root/flux").join(name)) for name in own - {"data:,"}} == {
        f"http://host/root{path}" for path in PATHS[1:]
    }
    for text in (page.text, css.text, js.text):
        assert "//" not in re.sub(r"^\s*//.*|//[^\"']*$", "", text, flags=re.MULTILINE)
        assert "@import" not in text
        assert "url(" not in text
    assert "<script>" not in page.text
    assert "style=" not in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
