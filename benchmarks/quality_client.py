"""Ask a server prompts through the OpenAI API: scores, routes and times of each answer."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
from openai import AsyncOpenAI, NotFoundError
from tqdm import tqdm

from benchmarks import quality_report as report
from benchmarks.timed_answers import came_in_a_burst, first_and_next_ms, time_answers
from training.data.encoding import Encoded

SERVED_NAME = "measured"
"""What servers call the model (`--served-model-name`)."""

Row = dict[str, Any]


class Client:
    """Asks one server, several requests at a time.

    Args:
        url: of the server.
        tokenizer: the model's, to write answers as text.
        sees_routes: whether the server shows a request's routes.
    """

    def __init__(self, url: str, tokenizer: Any, sees_routes: bool) -> None:
        self._url = f"{url}/v1"
        self._tokenizer = tokenizer
        self._sees_routes = sees_routes

    def ask(
        self, prompts: Sequence[Encoded], before: Sequence[Encoded], at_once: int, title: str
    ) -> Row:
        """Ask all prompts and score the answers.

        Args:
            prompts: P of them.
            before: asked first, on the same context; empty: nothing.
            at_once: requests in flight.
            title: of the progress bar.

        Returns: by prompt `score`, `answer` and `routes`, the last None where no routes are seen;
            `cached_share`, of all prompt tokens those that came from the prefix cache.
        """

        async def one(client: AsyncOpenAI, at: int) -> Row:
            salt = str(uuid.uuid4())
            if before:
                tokens = before[at].token_ids[: before[at].prompt_len].tolist()
                await _complete(client, tokens, salt, max_tokens=1)
            return await self._answer(client, prompts[at], salt)

        found = _run(self._url, one, len(prompts), at_once, title)
        return {
            "score": [answer["score"] for answer in found],
            "answer": [answer["text"] for answer in found],
            "routes": [answer["routes"] for answer in found] if self._sees_routes else None,
            "cached_share": sum(answer["cached"] for answer in found)
            / sum(prompt.prompt_len for prompt in prompts),
        }

    async def _answer(self, client: AsyncOpenAI, prompt: Encoded, salt: str) -> Row:
        forced = report.tokens_to_force(prompt)
        answer = await _complete(
            client,
            prompt.token_ids[: prompt.prompt_len].tolist(),
            salt,
            max_tokens=len(prompt) - prompt.prompt_len,
            logprobs=1,
            forced=forced,
        )
        choice = answer.choices[0]
        sampled = choice.model_extra["token_ids"]
        if sampled[: len(forced)] != forced:
            raise RuntimeError(
                f"expected the server to decode the forced tokens {forced}, found {sampled}; its "
                "--logits-processors did not work, see its log"
            )
        chosen = chosen_tokens(sampled, choice.logprobs.top_logprobs, len(forced))
        chosen = chosen[prompt.prefix_len :]
        cached = answer.usage.prompt_tokens_details
        return {
            "score": report.score(prompt, chosen),
            "text": self._tokenizer.decode(chosen),
            "routes": await _routes(client, answer.id) if self._sees_routes else None,
            "cached": (cached.cached_tokens or 0) if cached else 0,
        }

    def time(self, prompts: Sequence[Encoded], output: int, at_once: int, title: str) -> Row:
        """Time streamed answers of `output` tokens, after as many untimed ones as run at once.

        Returns: `ttft_ms` and `token_ms`, each with median, percentiles and all values; `bursts`,
            for each answer whether its tokens came at once, so that the two say little.
        """
        warm_up = [prompts[at % len(prompts)] for at in range(at_once)]
        bodies = [
            _body(prompt.token_ids[: prompt.prompt_len].tolist(), str(uuid.uuid4()), output)
            for prompt in [*warm_up, *prompts]
        ]
        arrived = time_answers(
            self._url, [body | {"stream": True} for body in bodies], len(warm_up), at_once, title
        )
        found = [first_and_next_ms(answer, output) for answer in arrived]
        row: Row = {"prompts": len(prompts), "output_tokens": output}
        for name, values in zip(("ttft_ms", "token_ms"), zip(*found, strict=True), strict=True):
            row[name] = report.spread(values) | {"values": [round(value, 3) for value in values]}
        return row | {"bursts": [came_in_a_burst(answer) for answer in arrived]}


def chosen_tokens(
    sampled: Sequence[int], top_logprobs: Sequence[dict[str, float]], forced: int
) -> list[int]:
    """Return the tokens that the model itself put first.

    Args:
        sampled: token ids of the answer.
        top_logprobs: for each the log-probabilities of the sampled and the likeliest token, by
            `token_id:ID`.
        forced: so many of the first were not the model's choice.

    Returns: as many token ids; where a forced token is as likely as the likeliest, that one.
    """
    chosen = list(sampled)
    for at in range(forced):
        likely = top_logprobs[at]
        best = max(likely.values())
        ids = [int(name.removeprefix("token_id:")) for name in likely if likely[name] == best]
        chosen[at] = sampled[at] if sampled[at] in ids else ids[0]
    return chosen


def _run(
    url: str,
    one: Callable[[AsyncOpenAI, int], Awaitable[Any]],
    count: int,
    at_once: int,
    title: str,
) -> list[Any]:
    """Await `one(client, i)` for all i below `count`, so many at once, with a progress bar."""

    async def limited(client: AsyncOpenAI, at: int, limit: asyncio.Semaphore, bar: Any) -> Any:
        async with limit:
            found = await one(client, at)
        bar.update()
        return found

    async def everything() -> list[Any]:
        limit = asyncio.Semaphore(at_once)
        options: Row = {"api_key": "none", "timeout": 600, "max_retries": 0}
        with tqdm(total=count, desc=title, mininterval=1.0) as bar:
            async with AsyncOpenAI(base_url=url, **options) as client:
                return await asyncio.gather(
                    *(limited(client, at, limit, bar) for at in range(count))
                )

    return asyncio.run(everything())


async def _complete(
    client: AsyncOpenAI,
    tokens: list[int],
    salt: str,
    max_tokens: int,
    logprobs: int | None = None,
    forced: Sequence[int] = (),
) -> Any:
    body = _body(tokens, salt, max_tokens)
    if forced:
        body["vllm_xargs"] = {"forced_tokens": list(forced)}
    asked = {name: body.pop(name) for name in ("model", "prompt", "max_tokens", "temperature")}
    return await client.completions.create(  # type: ignore[call-overload]
        **asked, logprobs=logprobs, extra_body=body
    )


def _body(tokens: list[int], salt: str, max_tokens: int) -> Row:
    """Make what every request holds."""
    return {
        "model": SERVED_NAME,
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "cache_salt": salt,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


async def _routes(client: AsyncOpenAI, request: str) -> str:
    """Return a request's route letters; on a GPU they may come a step after its first token."""
    for _ in range(100):
        try:
            view = await client.get(f"/flux/requests/{request}", cast_to=httpx.Response)
        except NotFoundError:
            await asyncio.sleep(0.05)
        else:
            letters: str = view.json()["requests"][0]["routes"]
            return letters
    raise RuntimeError(
        f"expected the routes of {request} at /v1/flux/requests, found none after 5 s; is "
        "`flux_live` among VLLM_PLUGINS?"
    )
