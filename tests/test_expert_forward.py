"""The experts of training compute what transformers' own do, gradients too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle as convert
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.training import expert_forward
from dense2moe.upcycle.training.expert_forward import sorted_experts_forward, use_sorted_experts
from tests.conftest import MakeDense

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GraniteForCausalLM",
    "Olmo2ForCausalLM",
    "GemmaForCausalLM",
)


class Experts:
    """Three experts with random weights in float64, as transformers lays them out."""

    num_experts, has_gate, has_bias, is_transposed, has_post_expert_norm = 3, True, False, False, False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = torch.randn(3, 10, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        self.down_proj = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


def every_expert(experts: Experts, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens, weighed by [T, E], by einsum."""
    gate, up = torch.einsum("th,eih->tei", hidden, experts.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, experts.down_proj, weights)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_values_and_gradients_are_those_of_all_experts_on_all_tokens(
    num_tokens: int, top_k: int, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.training.expert_forward._uses_onednn", lambda _: filled)
    experts, generator = Experts(), torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    scores = torch.randn(num_tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    outward = torch.randn(num_tokens, 4, dtype=torch.float64, generator=generator)
    leaves = (hidden, scores, experts.gate_up_proj, experts.down_proj)

    chosen = scores.softmax(-1).topk(top_k, dim=-1)
    found = sorted_experts_forward(experts, hidden, chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True))
    gradients = torch.autograd.grad((found * outward).sum(), leaves)

    masked = scores.softmax(-1) * F.one_hot(scores.topk(top_k, dim=-1).indices, 3).sum(1)
    expected = every_expert(experts, hidden, masked / masked.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * outward).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_products_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = expert_forward._run_expert

    def count(experts: Any, part: torch.Tensor, *matrices: Any) -> torch.Tensor:
        sizes.append(len(part))
        return run(experts, part, *matrices)

    monkeypatch.setattr(expert_forward, "_run_expert", count)
    chosen = torch.tensor([0] * 33 + [1] * 7)[:, None]
    experts, hidden = Experts(), torch.randn(40, 4, dtype=torch.float64)
    sorted_experts_forward(experts, hidden, chosen, torch.ones(40, 1))
    assert sizes == [33, 7]
    experts.gate_up_proj, experts.down_proj = experts.gate_up_proj.detach().float(), experts.down_proj.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = sorted_experts_forward(experts, hidden.float(), chosen, torch.ones(40, 1))
    assert sizes[2:] == [64, 32]
    assert found.shape == hidden.shape


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    experts = Experts()
    index = torch.tensor([[0], [2], [2]])
    sorted_experts_forward(
        experts, torch.ones(3, 4, dtype=torch.float64), index, torch.ones(3, 1, dtype=torch.float64)
    ).sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert experts.gate_up_proj.grad[1].abs().max() == 0
    assert experts.gate_up_proj.grad[2].abs().max() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_of_every_target_is_the_step_of_transformers_own_experts(
    architecture: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    convert(
        make_dense(architecture=architecture),
        tmp_path,
        UpcycleConfig(num_experts=4, experts=ExpertsConfig(noise=0.1)),
        0,
        lambda *_: None,
    )
    ours, theirs = load_model(tmp_path, torch.float32), load_model(tmp_path, torch.float32)  # with `eager` experts
    use_sorted_experts(ours)
    ids = torch.randint(ours.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if not other.numel():
            continue  # a shared expert of width 0
        scale = float(other.grad.abs().max())
        # Sums in another order: a few units of float32's last place of the largest.
        assert float((mine.grad - other.grad).abs().max()) <= 1e-5 * max(scale, 1e-6), name  # type: ignore[operator]
