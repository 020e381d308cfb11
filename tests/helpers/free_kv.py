"""An engine in which nothing outlives its block: what is free is overwritten before each step."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flux_vllm.kv.check import SCHEDULERS
from flux_vllm.router.route import Route
from tests.helpers.engine import Answer, Engine

POISON = 1e3
"""Finite: kernels multiply what they mask by 0."""


class PoisonedEngine(Engine):
    """An engine that overwrites blocks which no request holds and no hit can find.

    Attributes:
        freed: ids of the blocks that living requests gave back, in order.
        most_running: most requests in a step.
    """

    def __init__(self, model: Path, flux: dict[str, Any], **arguments: Any) -> None:
        super().__init__(model, flux, **arguments)
        self.freed: list[int] = []
        self.most_running = 0
        self._poisoned: set[int] = set()
        self.manager = self.core.scheduler.kv_cache_manager
        self.managers = self.manager.coordinator.single_type_managers
        for manager in self.managers:
            if hasattr(manager, "free_middle"):
                self._note_freed(manager)
        execute = self.worker.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._poison()
            running = len(scheduler_output.num_scheduled_tokens)
            self.most_running = max(self.most_running, running)
            return execute(scheduler_output, *args, **kwargs)

        self.worker.execute_model = execute_model

    def _note_freed(self, manager: Any) -> None:
        free_middle = manager.free_middle

        def noted(request_id: str, end: int) -> int:
            before = list(manager.req_to_blocks.get(request_id, ()))
            count = free_middle(request_id, end)
            after = manager.req_to_blocks.get(request_id, ())
            gone = [old.block_id for old, new in zip(before, after, strict=True) if old is not new]
            blocks = self.manager.block_pool.blocks
            assert sum(blocks[i].ref_cnt == 0 for i in gone) == count
            self.freed += gone
            return count

        manager.free_middle = noted

    def _poison(self) -> None:
        free = {
            block.block_id
            for block in self.manager.block_pool.blocks[1:]
            if block.ref_cnt == 0 and block.block_hash is None
        }
        new = sorted(free - self._poisoned)  # the others are as they were left
        self._poisoned = free
        for layer in self.worker.vllm_config.compilation_config.static_forward_context.values():
            layer.kv_cache[new] = POISON

    def evict_freed(self) -> None:
        """Take what living requests gave back out of the prefix cache: it is overwritten then."""
        blocks = self.manager.block_pool.blocks
        self.manager.evict_blocks({i for i in self.freed if blocks[i].ref_cnt == 0})


def schedule_ahead(monkeypatch: Any) -> None:
    """Have later engines schedule each step before the one before it is processed, as on GPUs.

    vLLM has this off on CPUs, whose model runner is made for it no more than for streams; the
    scheduler does not mind.
    """
    from vllm.v1.engine.core import EngineCore

    initialize = EngineCore._initialize_kv_caches

    def initialized(self: Any, vllm_config: Any) -> Any:
        kv_cache_config = initialize(self, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
        if vllm_config.scheduler_config.scheduler_cls is not None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[True]
        return kv_cache_config

    monkeypatch.setattr(EngineCore, "_initialize_kv_caches", initialized)


def given_back(
    answers: Iterable[Answer],
    *,
    block_size: int,
    sink_tokens: int,
    window_tokens: int,
    routes: Sequence[int] | None = None,
) -> int:
    """Count, by the formula of docs/KV_MEMORY.md, the blocks given back until answers' ends.

    Args:
        answers: of requests that ran to their ends.
        block_size: tokens a block.
        sink_tokens: of SPARSE layers.
        window_tokens: of SPARSE layers.
        routes: by cluster; default each answer's own, by layer.
    """
    blocks, sink_blocks = 0, max(1, -(-sink_tokens // block_size))
    for answer in answers:
        tokens = len(answer.prompt) + len(answer.tokens)
        end = (tokens - 128 - window_tokens) // block_size
        sparse = sum(route == Route.SPARSE for route in routes or answer.routes or ())
        blocks += sparse * max(end - sink_blocks, 0)
    return blocks
