"""Requests and answers of a served engine.

Oracle: a server of the standard library that keeps what it is sent.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks import engine as module
from benchmarks.real_tasks.engine import Request, ServedEngine


class Replies:
    """What the server answers, and what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.of_path: dict[str, tuple[int, Any]] = {}


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replies]:
    kept = Replies()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body: Any) -> None:
            kept.sent.append((self.path, body))
            status, value = kept.of_path.get(self.path, (404, {"error": "no such"}))
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self) -> None:
            self._reply(None)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    class FakeServer:
        url = f"http://127.0.0.1:{server.server_port}"

        def __init__(self, arguments: Any, log: Path, start_seconds: float) -> None:
            pass

    monkeypatch.setattr(module, "Server", FakeServer)
    monkeypatch.setattr(module, "_environment", lambda runner: {})
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


def _reply(token_ids: list[int], top: list[dict[str, float]] | None = None) -> dict[str, Any]:
    choice = {"text": "so", "token_ids": token_ids, "finish_reason": "length"}
    return {"id": "cmpl-1", "choices": [choice | {"logprobs": {"top_logprobs": top}}]}


def _engine() -> ServedEngine:
    return ServedEngine([], Path("log"), "v1", at_once=2)


def test_ask_is_greedy_and_reads_candidates(replies: Replies) -> None:
    top = [{"token_id:5": -0.5, "token_id:6": -1.0}]
    replies.of_path["/v1/completions"] = (200, _reply([5], top))
    request = Request(token_ids=[1, 2], max_tokens=9, min_tokens=3, with_logprobs=True)
    (answer,) = _engine().ask([request], "title")
    assert answer.top_logprobs == [{5: -0.5, 6: -1.0}]
    assert (answer.id, answer.text, answer.token_ids) == ("cmpl-1", "so", [5])
    ((_, body),) = replies.sent
    assert body["prompt"] == [1, 2]
    assert (body["temperature"], body["max_tokens"], body["min_tokens"]) == (0, 9, 3)
    assert body["logprobs"] == 20
    assert "vllm_xargs" not in body


def test_ask_forces_tokens_and_checks_them(replies: Replies) -> None:
    replies.of_path["/v1/completions"] = (200, _reply([5, 6]))
    request = Request(token_ids=[1], max_tokens=2, forced=(5, 6))
    _engine().ask([request], "title")
    body = replies.sent[0][1]
    assert body["vllm_xargs"] == {"forced_tokens": [5, 6]}
    assert (body["max_tokens"], body["ignore_eos"]) == (2, True)
    replies.of_path["/v1/completions"] = (200, _reply([5, 7]))
    with pytest.raises(RuntimeError, match="expected the engine to decode the tokens"):
        _engine().ask([request], "title")


def test_ask_keeps_the_order(replies: Replies) -> None:
    replies.of_path["/v1/completions"] = (200, _reply([5]))
    _engine().ask([Request(token_ids=[at], max_tokens=1) for at in range(7)], "title")
    assert sorted(body["prompt"][0] for _, body in replies.sent) == list(range(7))


def test_ask_tells_of_a_refusal(replies: Replies) -> None:
    replies.of_path["/v1/completions"] = (400, {"error": "too long"})
    with pytest.raises(RuntimeError, match="expected an answer, found status 400: .*too long"):
        _engine().ask([Request(token_ids=[1], max_tokens=1)], "title")


def test_routes_are_asked_for_once_the_log_is_complete(replies: Replies) -> None:
    replies.of_path["/collective_rpc"] = (200, {})
    found = {"requests": [{"routes": "SF-S", "full_probability": [0.1, 0.9, None, 0.2]}]}
    replies.of_path["/v1/flux/requests/cmpl-1"] = (200, found)
    first, second = _engine().routes(["cmpl-1", "cmpl-2"], "title")
    assert first is not None
    assert first.sparse_share == pytest.approx(2 / 3)
    assert second is None
    assert replies.sent[0] == ("/collective_rpc", {"method": "settle_flux", "args": []})


def test_call_worker_tells_of_a_failure(replies: Replies) -> None:
    replies.of_path["/collective_rpc"] = (500, {"error": "no such method"})
    with pytest.raises(RuntimeError, match="nothing: expected the worker to return"):
        _engine().call_worker("nothing", 1)
