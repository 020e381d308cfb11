"""Given prompts on an engine that is stepped in this process: all at once, or mixed and aborted."""

import random
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.queue_load import count_preemptions

_STEPS_AN_ABORT = 20


def answer_prompts(
    core: Any, scheduler: Any, prompts: Sequence[Sequence[int]], sampling: Any
) -> dict[str, Any]:
    """Answer prompts that are all there from the beginning.

    Args:
        core: vLLM's LLMEngine.
        scheduler: its scheduler.
        prompts: token ids.
        sampling: vLLM's SamplingParams of all of them.

    Returns: `tokens` of each answer; `most_running` and `mean_running` requests at once (the mean
        while others waited), `preemptions`, `seconds`.
    """
    names = [f"prompt-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        core.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
    preemptions = count_preemptions(scheduler)
    tokens: dict[str, list[int]] = {}
    running: list[tuple[int, bool]] = []
    begin = time.perf_counter()
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        running.append((len(scheduler.running), bool(scheduler.waiting)))
    while_waiting = [count for count, waits in running if waits]
    return {
        "tokens": [tokens[name] for name in names],
        "most_running": max(count for count, _ in running),
        "mean_running": sum(while_waiting) / max(len(while_waiting), 1),
        "preemptions": len(preemptions),
        "seconds": time.perf_counter() - begin,
    }


def soak(
    core: Any, scheduler: Any, prompts: Sequence[Sequence[int]], requests: int, seed: int, make: Any
) -> dict[str, int]:
    """Run mixed requests, some of them aborted, and say what is left.

    Args:
        core: vLLM's LLMEngine.
        scheduler: its scheduler.
        prompts: of which each request takes a beginning.
        requests: how many.
        seed: of everything random.
        make: SamplingParams for so many tokens.

    Returns: `aborted` and `preemptions`; `blocks` of the KV cache, the null block left out, and
        how many of them are `free_blocks` at the end.
    """
    chooser, preemptions = random.Random(seed), count_preemptions(scheduler)
    added = aborted = 0
    while added < requests or core.has_unfinished_requests():
        while added < requests and len(scheduler.waiting) < 8:
            prompt = chooser.choice(prompts)
            prompt = prompt[: chooser.randrange(1, len(prompt) + 1)]
            tokens = make(chooser.randrange(1, 65))
            core.add_request(f"soak-{added}", {"prompt_token_ids": list(prompt)}, tokens)
            added += 1
        if chooser.random() < 1 / _STEPS_AN_ABORT:
            core.abort_request([f"soak-{chooser.randrange(max(0, added - 40), added)}"])
            aborted += 1
        core.step()
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "requests": added,
        "aborted": aborted,
        "preemptions": len(preemptions),
        "blocks": len(pool.blocks) - 1,
        "free_blocks": pool.get_num_free_blocks(),
    }
