"""Processes that time streamed answers, against a server whose pace is known.

Oracle: the pauses that a small HTTP server of this test makes between the pieces it sends.
"""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.timed_answers import came_in_a_burst, first_and_next_ms, time_answers

FIRST_S, GAP_S = 0.1, 0.01


class _Server(ThreadingHTTPServer):
    """Streams `max_tokens` tokens at the pace that the prompt names; notes who asks at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.running, self.most_running = 0, 0
        self.clients: set[tuple[str, int]] = set()
        self.asked: list[str] = []
        self.running_at_start: list[int] = []

    def count(self, change: int) -> None:
        with self.lock:
            if change > 0:
                self.running_at_start.append(self.running)
            self.running += change
            self.most_running = max(self.most_running, self.running)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        assert body["stream"]
        self.server.clients.add(self.client_address)
        self.server.asked.append(body["prompt"])
        if body["prompt"] == "refused":
            self.send_error(400, "no such prompt")
            return
        self.server.count(1)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = [{"choices": [{"token_ids": [7]}]} for _ in range(body["max_tokens"])]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in [*pieces, {"choices": []}]]
        time.sleep(FIRST_S)
        if body["prompt"] == "held back":
            time.sleep(GAP_S * len(pieces))
            lines = ["".join(lines)]
        for line in [*lines, "data: [DONE]\n\n"]:
            self.wfile.write(f"{len(line):x}\r\n{line}\r\n".encode())
            time.sleep(GAP_S)
        self.server.count(-1)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _body(prompt: str, tokens: int = 8) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "stream": True}


def test_answers_are_timed_at_once_each_by_a_process(server: _Server) -> None:
    prompts = ["paced", "held back", "paced", "paced", "held back", "paced"]
    bodies = [_body("warm up") for _ in range(3)] + [_body(prompt) for prompt in prompts]
    found = time_answers(server.url, bodies, warm_up=3, at_once=3, title="timing")
    assert server.most_running == 3
    assert len(server.clients) == 3, "expected a connection a process"
    assert server.asked[:3] == ["warm up"] * 3, "nothing is timed while processes warm up"
    for prompt, arrived in zip(prompts, found, strict=True):
        first, following = first_and_next_ms(arrived, 8)
        assert came_in_a_burst(arrived) == (prompt == "held back")
        if prompt == "paced":
            assert first >= 1e3 * FIRST_S
            assert following >= 0.9e3 * GAP_S
        else:
            assert first >= 1e3 * (FIRST_S + 8 * GAP_S)
            assert following < 0.9e3 * GAP_S


def test_a_wave_begins_when_the_one_before_has_ended(server: _Server) -> None:
    lengths = [2, 8, 2, 8, 2]
    bodies = [_body("paced", tokens) for tokens in lengths]
    found = time_answers(server.url, bodies, 0, at_once=2, title="timing", in_waves=True)
    assert [sum(count for _, count in one) for one in found] == lengths, "expected their order"
    assert server.running_at_start == [0, 1, 0, 1, 0]


def test_a_failed_request_ends_all_with_its_error(server: _Server) -> None:
    bodies = [_body("refused"), *(_body("paced") for _ in range(20))]
    with pytest.raises(RuntimeError, match=r"status 400.*no such prompt"):
        time_answers(server.url, bodies, warm_up=0, at_once=2, title="timing")
    assert len(server.asked) < 5, "expected no more requests once one has failed"


def test_times_of_an_answer() -> None:
    arrived = [(200.0, 1), (203.0, 2), (206.0, 1)]
    assert first_and_next_ms(arrived, 4) == (200.0, 2.0)
    for found, output in ((arrived, 5), ([(200.0, 4)], 4)):
        with pytest.raises(RuntimeError, match=f"expected {output} tokens in at least two pieces"):
            first_and_next_ms(found, output)


def test_a_burst_is_most_tokens_at_once() -> None:
    paced = [(200.0 + 2 * at, 1) for at in range(128)]
    assert not came_in_a_burst(paced)
    # 127 tokens within 13 ms, as a real run had them.
    assert came_in_a_burst([(600.0 + 0.1 * at, 1) for at in range(128)])
    half = [(900.0 + 0.1 * at, 1) for at in range(60)]
    assert not came_in_a_burst([*half, *((1000.0 + 2 * at, 1) for at in range(68))])
