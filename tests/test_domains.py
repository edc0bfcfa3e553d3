"""Domains with experts of their own: losses and figures beside loops in Python, and what training does with them."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score
from training_runs import CONFIG, TrainAlone, make_data, make_train_alone

from dense2moe.upcycle.gates.domains import domain_experts, domain_loss, expert_information, faded
from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.training.config import FinetuneConfig, TrainingPhase

__all__ = ["make_data", "make_train_alone"]  # fixtures


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_domains", [2, 4])
def test_the_domain_loss_is_a_loop_over_tokens(score: str, num_domains: int) -> None:
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * 3
    domains = torch.tensor([1, 0, num_domains - 1])
    share, total = 4 // num_domains, 0.0
    for token in range(12):
        values = [math.exp(z) if score == "softmax" else 1 / (1 + math.exp(-z)) for z in logits[token].tolist()]
        own = int(domains[token // 4]) * share
        total -= math.log(sum(values[own : own + share]) / sum(values))
    found = domain_loss(logits, Gate(4, TopK(2), score), domains, num_domains)
    assert float(found) == pytest.approx(total / 12, rel=1e-5)


def test_the_domain_loss_is_finite_for_a_router_that_is_sure_of_the_wrong_domain() -> None:
    logits = torch.tensor([[200.0, -200.0]]).requires_grad_()
    loss = domain_loss(logits, Gate(2, TopK(1)), torch.tensor([1]), 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(400.0)
    assert gradient.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("done", "weight"), [(0.0, 0.2), (0.125, 0.15), (0.25, 0.1), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)]
)
def test_the_weight_fades_linearly_to_nothing(done: float, weight: float) -> None:
    assert faded(0.2, 0.5, done) == pytest.approx(weight)


def test_information_is_what_scikit_learn_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randint(limit, (600,), generator=draw) for limit in (4, 2, 3)])
    loads = torch.nn.functional.one_hot(experts, 4).float().mean(1)
    domains = torch.arange(3).repeat_interleave(600)
    expected = mutual_info_score(domains.numpy(), experts.flatten().numpy())
    assert float(expert_information(loads)) == pytest.approx(expected, rel=1e-6)


def test_information_is_nothing_where_all_domains_go_alike_and_most_where_each_has_its_expert() -> None:
    alike = torch.tensor([0.7, 0.3]).expand(3, 2, 2)
    assert expert_information(alike).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert float(expert_information(torch.eye(4))) == pytest.approx(math.log(4))


def test_experts_are_divided_over_domains_in_order() -> None:
    assert domain_experts(torch.tensor([1, 0]), 3, 2, 4, 2).tolist() == [[2, 3]] * 3 + [[0, 1]] * 3
    assert domain_experts(torch.tensor([1]), 4, 2, 8, 2).tolist() == [[4, 5], [6, 7], [4, 5], [6, 7]]


def test_the_domain_loss_falls_and_is_told_while_it_has_a_weight(train_alone: TrainAlone) -> None:
    settings = {"train": "router", "steps": 8, "balance_coefficient": 0.0, "router_learning_rate": 3e-2}
    plain, _ = train_alone(CONFIG.model_copy(update=settings | {"domain_coefficient": 0.0}))
    told, _ = train_alone(CONFIG.model_copy(update=settings | {"domain_coefficient": 1.0, "domain_fade": 0.5}))
    assert all(step.domain_loss is None for step in plain.history)
    losses = {step.step: step.domain_loss for step in told.history if step.train_loss is not None}
    assert [step for step, loss in losses.items() if loss is not None] == [1, 2, 3, 4]
    assert losses[4] < 0.8 * losses[1]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("num_domains", "num_experts", "given", "weights"),
    [
        (4, 8, {}, (0.0, 0.1)),
        (1, 8, {}, (0.01, 0.0)),
        (3, 8, {}, (0.01, 0.0)),
        (4, 0, {}, (0.01, 0.0)),  # the dense control
        (4, 8, {"domain_coefficient": 0.0}, (0.01, 0.0)),
        (4, 8, {"balance_coefficient": 0.02}, (0.02, 0.1)),
        (4, 8, {"train": "prompt"}, (0.01, 0.0)),
        (4, 8, {"train": "experts", "routing": "by-domain"}, (0.01, 0.0)),
    ],
)
def test_domains_that_divide_the_experts_have_a_loss_and_no_balance_by_default(
    num_domains: int, num_experts: int, given: dict[str, object], weights: tuple[float, float]
) -> None:
    losses = FinetuneConfig.model_validate(given).settle(num_domains, num_experts).router_losses
    assert (losses.balance_coefficient, losses.domain_coefficient) == weights


def test_every_phase_has_the_losses_that_fit_it() -> None:
    stages = (
        TrainingPhase(train="experts", routing="by-domain"),
        TrainingPhase(domain_coefficient=0.0),
        TrainingPhase(),
    )
    found = [phase.router_losses for phase in FinetuneConfig(stages=stages).settle(2, 4).resolve_phases()]
    assert [(each.balance_coefficient, each.domain_coefficient) for each in found] == [
        (0.01, 0.0),
        (0.01, 0.0),
        (0.0, 0.1),
    ]
