"""vLLM's model, called beside its batches: no KV cache, no request, one forward of fixed shape.

vLLM 0.32 and 0.33. `tests/unit/hooks/test_sources.py` fails when vLLM's side of it changes.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from flux_vllm.routing.probe import ProbeDone
from flux_vllm.routing.stages import receive_hidden_states, send_hidden_states
from flux_vllm.routing.state_layers import StateLayers


class RunnerModelCall:
    """The model of a vLLM model runner, V1 or V2.

    Args:
        runner: its model loaded.
        vllm_config: the engine's.
        states: its layers that carry a state from token to token.
        device: of the model.
    """

    def __init__(
        self, runner: Any, vllm_config: Any, states: StateLayers, device: torch.device
    ) -> None:
        self._runner = runner
        self._states = states
        self._vllm_config = vllm_config
        self._device = device
        model_config = vllm_config.model_config
        # Such a model is compiled for embeddings, and compiled code does not look at what it gets.
        self._takes_embeddings = (
            model_config.supports_multimodal_inputs or model_config.enable_prompt_embeds
        )
        self._has_adapters = vllm_config.lora_config is not None
        self._axes: torch.Tensor | None = None
        """Of a model with several position axes: their rows, all alike where nothing but text is
        asked; as long as vLLM's own, for which it is compiled."""
        if model_config.uses_mrope:
            row = vllm_config.scheduler_config.max_num_batched_tokens + 1
            shape = model_config.mrope_num_dims, row
            self._axes = torch.zeros(shape, dtype=torch.int64, device=device)

    @property
    def can_be_captured(self) -> bool:
        """Whether one CUDA graph serves all requests, where the engine has any.

        Not with LoRA, whose kernels are launched by the number of adapters in use, nor with layers
        that carry a state: vLLM captures these in decode alone. Nor with pipeline stages, which
        say on the host what they send.
        """
        mode = self._vllm_config.compilation_config.cudagraph_mode
        is_whole = self._vllm_config.parallel_config.pipeline_parallel_size == 1
        is_fixed = not self._has_adapters and not len(self._states)
        return self._device.type == "cuda" and mode.name != "NONE" and is_fixed and is_whole

    @property
    def can_stop(self) -> bool:
        """Whether a call may end at a layer, once a router looks at nothing more.

        Not with pipeline stages, the next of which awaits hidden states. Nor where vLLM tidies up
        only after layers that return: offloaded weights, which one layer fetches for another,
        Inductor's partitions of a graph, and NVTX ranges by layer.
        """
        from vllm.model_executor.offloader.base import NoopOffloader, get_offloader

        config = self._vllm_config
        return (
            config.parallel_config.pipeline_parallel_size == 1
            and isinstance(get_offloader(), NoopOffloader)
            and not config.compilation_config.use_inductor_graph_partition
            and not config.observability_config.enable_layerwise_nvtx_tracing
        )

    def __call__(
        self, metadata: dict[str, Any], token_ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Run the model over tokens; see `ModelCall`.

        Without a slot mapping vLLM writes no keys and values. Its own CUDA graphs stay aside: the
        mode of a forward context is NONE unless it is said.
        """
        from vllm.forward_context import set_forward_context

        model, tokens = self._runner.get_model(), len(positions)
        if self._axes is not None:
            positions = self._axes[:, :tokens].copy_(positions)
        received, embeddings = receive_hidden_states(), None
        if self._takes_embeddings and received is None:
            embeddings = model.embed_input_ids(token_ids)
            if not getattr(model, "requires_raw_input_tokens", False):
                token_ids = None  # type: ignore[assignment]
        context = set_forward_context(
            metadata | self._states.metadata, self._vllm_config, num_tokens=tokens
        )
        with suppress(ProbeDone):  # outermost: context and states are left first
            with context, self._states.apart():
                output = model(
                    input_ids=token_ids,
                    positions=positions,
                    intermediate_tensors=received,
                    inputs_embeds=embeddings,
                )
            send_hidden_states(output)

    def use_adapter(self, adapter: Any, tokens: int) -> None:
        """Switch to a LoRA adapter, or to none; the step's own forward switches again.

        Args:
            adapter: vLLM's LoRARequest, or None.
            tokens: of the next call.
        """
        if not self._has_adapters:
            return
        number = 0 if adapter is None else adapter.lora_int_id
        requests = set() if adapter is None else {adapter}
        self._runner._set_active_loras((number,), (number,) * tokens, requests)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture work as a CUDA graph, as vLLM captures its own, into the pool of those.

        The pool may be shared: a replay's intermediate values are used up before the next one of
        any graph begins, and what stays lies outside of it.

        Args:
            work: calls the model on the same tensors each time.

        Returns: the replay.
        """
        from vllm.compilation.cudagraph_pool import capture_pool
        from vllm.distributed.parallel_state import graph_capture
        from vllm.model_executor.offloader.base import get_offloader
        from vllm.platforms import current_platform

        graph = torch.cuda.CUDAGraph()
        with graph_capture(device=self._device) as context:
            for _ in range(2):  # compile, tune and allocate first
                work()
            get_offloader().sync_prev_onload()
            with (
                capture_pool(current_platform.get_global_graph_pool(), self._vllm_config) as pool,
                torch.cuda.graph(graph, pool, stream=context.stream),
            ):
                work()
                get_offloader().join_after_forward()
        return graph.replay
