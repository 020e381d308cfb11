"""What benchmarks add to vLLM's workers (`worker_extension_cls`)."""

from typing import Any

import torch

from flux_vllm.router.route import Route


class BenchmarkWorker:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`."""

    def skip_attention(self: Any, skip: bool) -> None:
        """Make eager attention calls do nothing, or attend again.

        Keys and values are written all the same. With random weights a decode step takes the same
        time whatever they are, so a benchmark of decode need not wait for attention in prefill.
        Replays of decode graphs are not affected.
        """
        from vllm.model_executor.layers.attention import Attention

        context = self.model_runner.vllm_config.compilation_config.static_forward_context
        for layer in context.values():
            if not isinstance(layer, Attention):  # layers of experts and states are there too
                continue
            if skip:
                layer.impl.forward = _leave_output
            else:
                vars(layer.impl).pop("forward", None)

    @torch.inference_mode()  # as vLLM's steps, whose tensors nothing else may write to
    def mix_rows(self: Any, sparse_rows: int) -> None:
        """Make so many of the live requests SPARSE in all layers, and the others FULL.

        Only decode goes by it: prefill under the policy `static` has the same routes for all.
        """
        runtime = self.flux_fix_routes.__self__
        runtime.fix_routes(())
        slots = [*runtime.table._slots.values()][:sparse_rows]
        rows = torch.tensor(slots, dtype=torch.long)[:, None]
        runtime.table.routes[rows, torch.tensor(runtime.routed_layers)] = int(Route.SPARSE)
        runtime.table.version += 1

    def forget_peak_memory(self) -> None:
        """Begin anew to look for the most memory that tensors take."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> tuple[int, int] | None:
        """Return bytes: (the most that tensors took since, what they take now); None on a CPU."""
        if not torch.cuda.is_available():
            return None
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()


def _leave_output(*args: Any, **kwargs: Any) -> Any:
    """Return the output buffer as it is; stands in for `AttentionImpl.forward`."""
    return kwargs["output"] if "output" in kwargs else args[6]
