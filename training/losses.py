"""How far answers are from full attention's, token by token and prompt by prompt.

Dimension legend: A answer tokens of all prompts, B prompts, L layers, V vocabulary.
"""

import torch
from torch.nn import functional


def distillation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Give KL(teacher || student) by token: two [A, V] float32 to [A], nats."""
    student = functional.log_softmax(student_logits, dim=-1)
    teacher = functional.log_softmax(teacher_logits, dim=-1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Give the answer's surprise by token: [A, V] and [A] to [A], nats."""
    return functional.cross_entropy(logits, targets, reduction="none")


def mean_by_prompt(
    token_losses: torch.Tensor, prompt_of_token: torch.Tensor, prompts: int
) -> torch.Tensor:
    """Average token losses within each prompt: [A], [A] int64 to [B].

    A short answer then counts as much as a long one.
    """
    sums = token_losses.new_zeros(prompts).index_add(0, prompt_of_token, token_losses)
    counts = torch.bincount(prompt_of_token, minlength=prompts).clamp(min=1)
    return sums / counts


def excess_confidence(router_logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Give the squared excess of the logits' lead over a bound: [L, B, 2] to a mean over B."""
    lead = router_logits[..., 1] - router_logits[..., 0]
    return torch.relu(lead.abs() - bound).square().sum(dim=0).mean()
