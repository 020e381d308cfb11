"""vLLM's schedulers, told what each request's routes let its KV cache groups give back."""

import logging
from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from flux_vllm.hooks.wrap import wrap_object
from flux_vllm.kv.channel import decided_routes
from flux_vllm.kv.coordinator import FluxCoordinator
from flux_vllm.metrics.directory import metrics_directory
from flux_vllm.metrics.kv_report import KVReport
from flux_vllm.metrics.store import MetricStore, model_label

logger = logging.getLogger("vllm.flux")


class _FreesByRoute:
    """What both schedulers do besides; stands before one of vLLM's in the order of classes."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)  # type: ignore[call-arg]
        groups = kv_cache_config.kv_cache_groups
        self._flux = FluxCoordinator(
            self.kv_cache_manager.coordinator,  # type: ignore[attr-defined]
            [[extract_layer_index(name) for name in group.layer_names] for group in groups],
            vllm_config.max_in_flight_tokens,
            self.max_model_len,  # type: ignore[attr-defined]
            _report(vllm_config, groups),
        ).install()
        wrap_object(self.kv_cache_manager, "get_computed_blocks", self._flux.look_up)  # type: ignore[attr-defined]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take up routes that came with a step's tokens; those of ended requests are passed over.

        Steps in flight attend under them, so what SPARSE does not read may go.
        """
        for request_id, routes in decided_routes(model_runner_output).items():
            if request_id in self.requests:  # type: ignore[attr-defined]
                self._flux.settle(request_id, routes)
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._flux.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class FluxScheduler(_FreesByRoute, Scheduler):
    """Schedules each step once the one before it is processed."""


class AsyncFluxScheduler(_FreesByRoute, AsyncScheduler):
    """Schedules each step while the one before it runs."""


def _report(vllm_config: Any, groups: Sequence[Any]) -> KVReport | None:
    """Start counting; what cannot be counted is said in the log, and no reason not to serve."""
    directory = metrics_directory()
    if directory is None:
        return None
    nbytes = max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)
    try:
        return KVReport(MetricStore(directory, model_label(vllm_config)), nbytes)
    except OSError as error:
        logger.warning(
            "flux: expected room for the counters of KV memory in %s, found: %s; requests are "
            "served without them: make room there, or let this user write there, and start again",
            directory,
            error,
        )
        return None
