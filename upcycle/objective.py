"""What training minimizes besides the balance of experts: pure tensor functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of logits [B, S, vocabulary] against the ids [B, S] that follow; a scalar."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean divergence KL(teacher || student) in nats over the positions that have a next token, times the squared temperature; a scalar.

    Both logits are [B, S, vocabulary], and both are divided by the temperature. The square keeps the gradient's size when the temperature changes
    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). No gradient flows into the teacher.
    """
    student = (logits[:, :-1].float() / temperature).log_softmax(-1).flatten(0, 1)
    teacher = (teacher_logits[:, :-1].detach().float() / temperature).log_softmax(-1).flatten(0, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
