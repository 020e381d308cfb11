"""One `vllm serve` that answers token prompts greedily through the OpenAI API."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.real_tasks.variants import SERVED_NAME
from demo.server import Server

MOST_LOGPROBS = 20
"""Of a token, what vLLM gives by default at most."""
_START_SECONDS = 900
_REQUEST_SECONDS = 900

TopLogprobs = dict[int, float]
"""The likeliest tokens of one position, and the one that was decoded; nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked."""

    token_ids: list[int]
    max_tokens: int
    min_tokens: int = 0
    forced: tuple[int, ...] = ()
    """Decoded by force, whatever the model would choose; then the answer ends."""
    with_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine gave for it."""

    id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    top_logprobs: list[TopLogprobs]
    """By token; empty where they were not asked for."""


@dataclass(frozen=True, slots=True)
class RequestRoutes:
    """A flux engine's decision for one request, of its own log."""

    letters: str
    """`S`, `F` or `-` (not routed) a layer."""
    full_probability: list[float | None]
    """To three digits; None where no router decided."""

    @property
    def sparse_share(self) -> float:
        """Share of SPARSE among the routed layers."""
        return self.letters.count("S") / max(1, len(self.letters.replace("-", "")))


class ServedEngine:
    """A server from its start to the end of a `with`.

    Args:
        arguments: what follows `vllm serve`.
        log: file for its output.
        runner: vLLM's model runner, `v1` or `v2`.
        at_once: requests in flight.
    """

    def __init__(self, arguments: Sequence[str], log: Path, runner: str, at_once: int) -> None:
        os.environ |= _environment(runner)
        self._server = Server(arguments, log, start_seconds=_START_SECONDS)
        self._at_once = at_once

    def __enter__(self) -> "ServedEngine":
        self._server.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._server.__exit__(*exc)

    @property
    def url(self) -> str:
        """Of the server."""
        return self._server.url

    def ask(self, requests: Sequence[Request], title: str) -> list[Answer]:
        """Answer all requests, several at a time.

        Raises: RuntimeError: one failed, or forced tokens were not decoded.
        """

        async def one(client: httpx.AsyncClient, request: Request) -> Answer:
            reply = await client.post("/v1/completions", json=_body(request))
            if reply.status_code != httpx.codes.OK:
                raise RuntimeError(
                    f"expected an answer, found status {reply.status_code}: {reply.text[:500]}"
                )
            answer = _answer(reply.json())
            if answer.token_ids[: len(request.forced)] != list(request.forced):
                raise RuntimeError(
                    "expected the engine to decode the tokens it was forced to, found others; its "
                    "--logits-processors did not work, see its log"
                )
            return answer

        return asyncio.run(self._each(one, requests, title))

    def call_worker(self, method: str, *args: Any) -> None:
        """Call a method of the workers, through one of vLLM's development endpoints."""
        reply = httpx.post(
            f"{self.url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=120
        )
        if reply.status_code != httpx.codes.OK:
            raise RuntimeError(
                f"{method}: expected the worker to return, found status {reply.status_code}: "
                f"{reply.text[:500]}; see the server's log"
            )

    def routes(self, ids: Sequence[str], title: str) -> list[RequestRoutes | None]:
        """Return what a flux engine decided for requests, by their answers' ids.

        None: the request needed no decision, as a context within sink and window.
        """
        self.call_worker("settle_flux")

        async def one(client: httpx.AsyncClient, name: str) -> RequestRoutes | None:
            reply = await client.get(f"/v1/flux/requests/{name}")
            if reply.status_code == httpx.codes.NOT_FOUND:
                return None
            reply.raise_for_status()
            (found,) = reply.json()["requests"]
            return RequestRoutes(found["routes"], found["full_probability"])

        return asyncio.run(self._each(one, ids, title))

    async def _each(self, one: Any, items: Sequence[Any], title: str) -> list[Any]:
        """Await `one(client, item)` for all items, so many at once, with a progress bar."""
        limit = asyncio.Semaphore(self._at_once)
        connections = httpx.Limits(max_connections=self._at_once)
        with tqdm(total=len(items), desc=title, mininterval=5.0) as bar:
            async with httpx.AsyncClient(
                base_url=self.url, timeout=_REQUEST_SECONDS, limits=connections
            ) as client:

                async def limited(item: Any) -> Any:
                    async with limit:
                        found = await one(client, item)
                    bar.update()
                    return found

                return await asyncio.gather(*map(limited, items))


def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": SERVED_NAME,
        "prompt": request.token_ids,
        "max_tokens": request.max_tokens,
        "min_tokens": request.min_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    if request.with_logprobs:
        body |= {"logprobs": MOST_LOGPROBS, "return_tokens_as_token_ids": True}
    if request.forced:
        forced = list(request.forced)
        body |= {"max_tokens": len(forced), "min_tokens": 0, "ignore_eos": True}
        body["vllm_xargs"] = {"forced_tokens": forced}
    return body


def _answer(reply: dict[str, Any]) -> Answer:
    (choice,) = reply["choices"]
    top = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return Answer(
        id=reply["id"],
        text=choice["text"],
        token_ids=choice["token_ids"],
        finish_reason=choice["finish_reason"],
        top_logprobs=[
            {int(name.removeprefix("token_id:")): value for name, value in position.items()}
            for position in top
        ],
    )


def _environment(runner: str) -> dict[str, str]:
    checkout = str(Path(__file__).resolve().parent.parent.parent)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        "VLLM_PLUGINS": "flux,flux_live",
        "VLLM_SERVER_DEV_MODE": "1",  # for `/collective_rpc`
        "VLLM_USE_V2_MODEL_RUNNER": {"v1": "0", "v2": "1"}[runner],
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(part for part in (checkout, *path) if part)),
    }
