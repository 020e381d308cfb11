"""Time streamed answers, each request in flight from a process of its own.

A client that several streams share is busy with one while another's tokens arrive: it would time
itself. Here a process waits for one answer at a time, with a body that was made before the clock
began, and notes when pieces came before it looks into them. What then still comes in a burst was
held back by the server. Processes run this file as a program, which imports little.
"""

import itertools
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import httpx
from tqdm import tqdm

BURST_GAP_MS = 0.5
"""Between tokens of a stream. Steps of the smallest served model took 1.6 ms on an H200; tokens
that had been held back followed each other within 0.1 to 0.2 ms."""

Arrivals = list[tuple[float, int]]
"""For each piece of a stream: milliseconds after the request, tokens in it."""


def time_answers(
    url: str,
    bodies: Sequence[dict[str, Any]],
    warm_up: int,
    at_once: int,
    title: str,
    in_waves: bool = False,
) -> list[Arrivals]:
    """Stream completions, so many at once.

    Args:
        url: of the API, with `/v1`.
        bodies: of the requests, in order; those that warm up come first.
        warm_up: how many do; all of them end before the timed ones begin.
        at_once: processes, each with one request in flight.
        title: of the progress bar.
        in_waves: whether `at_once` timed requests begin together, and the next ones when all of
            these have ended; else each begins as soon as a process is free.

    Returns: what arrived for each timed request.
    Raises: RuntimeError: a request failed.
    """
    texts = [json.dumps(body) for body in bodies]
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(texts), desc=title, mininterval=1.0))
        askers = [stack.enter_context(_Asker(url)) for _ in range(at_once)]
        _share_out(askers, texts[:warm_up], bar)
        timed = texts[warm_up:]
        wave = at_once if in_waves else max(1, len(timed))
        starts = range(0, len(timed), wave)
        return [one for at in starts for one in _share_out(askers, timed[at : at + wave], bar)]


def _share_out(askers: Sequence["_Asker"], texts: Sequence[str], bar: Any) -> list[Arrivals]:
    """Give every process the next request as soon as it is free."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(texts)):
        waiting.put(index)
    found: dict[int, Arrivals] = {}
    counting, stop = threading.Lock(), threading.Event()

    def work(asker: _Asker) -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            found[index] = asker.ask(texts[index])
            with counting:
                bar.update()

    with ThreadPoolExecutor(len(askers)) as threads:
        working = [threads.submit(work, asker) for asker in askers]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after a failure, or a signal, the others begin no more
        for future in working:
            future.result()
    return [found[index] for index in range(len(texts))]


class _Asker:
    """The caller's end of one process that asks."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, body: str) -> Arrivals:
        """Send a request and wait for all of its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{body}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("expected an answer's times, found that the asking process ended")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"expected a streamed answer, found {reply['error']}")
        return [(ms, count) for ms, count in reply["arrived"]]

    def __enter__(self) -> "_Asker":
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process, which reads until its input ends."""
        if exc[0] is not None:
            self._process.kill()
        self._process.communicate()


def first_and_next_ms(arrived: Arrivals, output: int) -> tuple[float, float]:
    """Return milliseconds to the first token, and a token after that.

    Args:
        arrived: of one answer.
        output: tokens it should have.

    Raises: RuntimeError: it has others, or came in one piece.
    """
    total = sum(count for _, count in arrived)
    if total != output or len(arrived) < 2:
        raise RuntimeError(
            f"expected {output} tokens in at least two pieces, found {total} in {len(arrived)}; "
            "see the server's log"
        )
    (first, with_first), (last, _) = arrived[0], arrived[-1]
    return first, (last - first) / (total - with_first)


def came_in_a_burst(arrived: Arrivals) -> bool:
    """Say whether most pieces came at once: the first one's time is then nearly all of them's."""
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(arrived)]
    return statistics.median(gaps) < BURST_GAP_MS


def _stream(client: httpx.Client, url: str, body: bytes) -> Arrivals:
    headers = {"Content-Type": "application/json"}
    lines: list[tuple[float, str]] = []
    begin = time.perf_counter()
    with client.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"status {response.status_code}: {response.read().decode()[:500]}")
        for line in response.iter_lines():
            lines.append((time.perf_counter(), line))
    arrived = []
    for moment, line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        choices = json.loads(data).get("choices", [])
        count = sum(len(choice.get("token_ids") or []) for choice in choices)
        if count:
            arrived.append(((moment - begin) * 1e3, count))
    return arrived


def _ask_until_input_ends(url: str) -> None:
    """Read a body a line, and write what arrived for it."""
    with httpx.Client(timeout=600) as client:
        for line in sys.stdin:
            try:
                reply: dict[str, Any] = {"arrived": _stream(client, url, line.encode())}
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                reply = {"error": repr(error)}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _ask_until_input_ends(f"{sys.argv[1]}/completions")
