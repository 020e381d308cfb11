"""What pipeline stages tell each other: their layers at the start, and each probe's results.

Stages hold different layers of one model. All of them probe the same prompts in the same order, so
a probe's hidden states travel as a batch's do, and every stage learns every layer's route.

vLLM 0.32 and 0.33. `tests/unit/hooks/test_sources.py` fails when vLLM's side of it changes.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather_over_stages(own: Sequence[T]) -> list[T]:
    """Collect what each stage has, in the order of the stages; for the start, stages wait."""
    from vllm.distributed import get_pp_group

    stages = get_pp_group()
    if stages.world_size == 1:
        return list(own)
    parts: list[Sequence[T]] = [()] * stages.world_size
    torch.distributed.all_gather_object(parts, own, group=stages.cpu_group)
    return [entry for part in parts for entry in part]


def sum_over_stages(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the stages' tensors, each of which is zero where it knows nothing.

    Host sync: none on a GPU. CUDA graph: no.
    """
    from vllm.distributed import get_pp_group

    stages = get_pp_group()
    if stages.world_size > 1:
        torch.distributed.all_reduce(tensor, group=stages.device_group)
    return tensor


def receive_hidden_states() -> Any:
    """Await the hidden states of the stage before: vLLM's IntermediateTensors, None if first."""
    from vllm.distributed import get_pp_group
    from vllm.sequence import IntermediateTensors

    stages = get_pp_group()
    return None if stages.is_first_rank else IntermediateTensors(stages.recv_tensor_dict())


def send_hidden_states(output: Any) -> None:
    """Hand a model's output to the next stage; the last one has none.

    Args:
        output: of the model; IntermediateTensors but on the last stage.

    Host sync: none on a GPU.
    """
    from vllm.distributed import get_pp_group

    stages = get_pp_group()
    if not stages.is_last_rank:
        stages.isend_tensor_dict(output.tensors)  # which keeps what it sends until it is sent
