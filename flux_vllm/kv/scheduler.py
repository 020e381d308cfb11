"""vLLM's schedulers, told what each request's routes let its KV cache groups give back."""

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from flux_vllm.kv.channel import decided_routes
from flux_vllm.kv.coordinator import FluxCoordinator
from flux_vllm.metrics.directory import metrics_directory
from flux_vllm.metrics.kv_report import KVReport
from flux_vllm.metrics.store import MetricStore


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

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._flux.asking = request.request_id
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._flux.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class FluxScheduler(_FreesByRoute, Scheduler):
    """Schedules each step once the one before it is processed."""


class AsyncFluxScheduler(_FreesByRoute, AsyncScheduler):
    """Schedules each step while the one before it runs."""


def _report(vllm_config: Any, groups: Sequence[Any]) -> KVReport | None:
    directory = metrics_directory()
    if directory is None:
        return None
    name = vllm_config.model_config.served_model_name
    labels = {"model_name": name if isinstance(name, str) else name[0]}
    nbytes = max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)
    return KVReport(MetricStore(directory, labels), nbytes)
