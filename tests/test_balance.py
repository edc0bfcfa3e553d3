"""The balance loss and what is watched of routing, by hand and by a second formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dense2moe.upcycle.gates.balance import (
    balance_loss,
    describe_routing,
    expert_cosine,
    expert_counts,
    expert_load,
    move_bias,
    router_entropy,
    router_margin,
    z_loss,
)
from dense2moe.upcycle.gates.facts import LayerRouting
from dense2moe.upcycle.gates.gate import Gate, TopK


def softmax(num_experts: int, k: int) -> Gate:
    return Gate(num_experts, TopK(k))


THREE_TO_ONE = [math.log(3.0), 0.0]  # logits of probabilities 3/4 and 1/4
ONE_TO_THREE = [0.0, math.log(3.0)]


@pytest.mark.parametrize(
    ("logits", "loss"),
    [
        # Each expert gets half of the tokens and mean probability (3/4 + 1/4) / 2: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
        ([THREE_TO_ONE, ONE_TO_THREE], 1.0),
        # All tokens to the first: load (1, 0), probability (3/4, 1/4): 2 * (1 * 3/4 + 0 * 1/4) = 3/2.
        ([THREE_TO_ONE, THREE_TO_ONE], 1.5),
        # Certain and all to the first: 2 * (1 * 1 + 0 * 0) = 2, the worst of two experts.
        ([[100.0, 0.0], [100.0, 0.0]], 2.0),
        # Certain and one each: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1, the best.
        ([[100.0, 0.0], [0.0, 100.0]], 1.0),
    ],
)
def test_the_loss_of_two_tokens_and_two_experts_is_as_by_hand(logits: list[list[float]], loss: float) -> None:
    assert float(balance_loss(torch.tensor(logits), softmax(2, 1))) == pytest.approx(loss, abs=1e-6)


def test_both_of_two_experts_chosen_are_balanced_whatever_the_router_says() -> None:
    # Load (1/2, 1/2): 2 * (1/2 * p + 1/2 * (1 - p)) = 1.
    assert float(balance_loss(torch.tensor([THREE_TO_ONE, THREE_TO_ONE]), softmax(2, 2))) == pytest.approx(
        1.0, abs=1e-6
    )


def test_layers_that_collapse_onto_different_experts_look_balanced_only_when_pooled() -> None:
    """Four layers of four experts, layer n sends everything to expert n."""
    layers = [torch.full((16, 4), -50.0).index_fill_(1, torch.tensor([layer]), 50.0) for layer in range(4)]
    pooled = float(load_balancing_loss_func(tuple(layers), num_experts=4, top_k=1))
    assert pooled == pytest.approx(1.0, abs=1e-6)  # transformers sees nothing wrong
    assert float(balance_loss(torch.cat(layers), softmax(4, 1))) == pytest.approx(1.0, abs=1e-6)
    assert [float(balance_loss(layer, softmax(4, 1))) for layer in layers] == pytest.approx([4.0] * 4, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_one_layer_scores_what_transformers_gives_it_over_top_k(top_k: int) -> None:
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 2
    # sums the load over slots where ours takes the mean
    theirs = float(load_balancing_loss_func((logits,), num_experts=6, top_k=top_k))
    assert float(balance_loss(logits, softmax(6, top_k))) == pytest.approx(theirs / top_k, rel=1e-5)


def test_gradients_flow_through_the_probabilities_alone() -> None:
    logits = (
        torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().requires_grad_()
    )
    balance_loss(logits, softmax(5, 2)).backward()
    # By hand, with the load as a constant c: L = E/T * sum_t sum_e c_e p_te, so dL/dz_tj = E/T * p_tj * (c_j - sum_e
    # c_e p_te).
    counts = torch.zeros(5)
    for row in logits.tolist():
        for expert in sorted(range(5), key=lambda e: -row[e])[:2]:
            counts[expert] += 1
    c = counts / counts.sum()
    p = torch.exp(logits.detach()) / torch.exp(logits.detach()).sum(-1, keepdim=True)
    expected = 5 / 50 * p * (c - (p * c).sum(-1, keepdim=True))
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected, atol=1e-7)  # float32 of values around .01
    assert float(expected.abs().max()) > 1e-3


def test_a_step_down_the_gradient_lowers_the_loss() -> None:
    logits = (
        torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    ).requires_grad_()
    before = balance_loss(logits, softmax(4, 1))
    before.backward()
    assert logits.grad is not None
    assert float(balance_loss(logits.detach() - 10 * logits.grad, softmax(4, 1))) < float(before.detach())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_is_counted_over_tokens_and_slots(top_k: int) -> None:
    logits = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    counts = [0] * 4
    for row in logits.tolist():
        for expert in sorted(range(4), key=lambda e: -row[e])[:top_k]:
            counts[expert] += 1
    load = expert_load(logits, softmax(4, top_k))
    assert load.tolist() == pytest.approx([count / (100 * top_k) for count in counts], abs=1e-6)
    assert float(load.sum()) == pytest.approx(1.0, abs=1e-6)


def test_entropy_is_zero_when_certain_and_the_logarithm_when_uniform() -> None:
    assert float(router_entropy(torch.tensor([[1000.0, 0.0, 0.0, 0.0]]), softmax(4, 1))) == 0.0
    assert float(router_entropy(torch.zeros(7, 4), softmax(4, 1))) == pytest.approx(math.log(4), rel=1e-6)
    # (3/4, 1/4): 3/4 log(4/3) + 1/4 log 4.
    assert float(router_entropy(torch.tensor([THREE_TO_ONE]), softmax(2, 1))) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4), rel=1e-6
    )


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_lies_between_its_bounds(scale: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    entropy = float(router_entropy(logits, softmax(8, 1)))
    assert 0.0 <= entropy <= math.log(8) * (1 + 1e-6)  # float32
    expected = torch.distributions.Categorical(logits=logits.float()).entropy().mean()
    assert entropy == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_a_layers_routing_is_its_load_and_entropy() -> None:
    first, second = torch.tensor([THREE_TO_ONE, THREE_TO_ONE]), torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    copies, opposite = torch.ones(2, 3, 4), torch.stack([torch.ones(3, 4), -torch.ones(3, 4)])
    loads = (expert_load(first, softmax(2, 1)), torch.tensor([0.25, 0.75]))  # the second's over more than these tokens
    found = describe_routing((1, 3), loads, (first, second), (copies, opposite), (None, None), softmax(2, 1))
    # ln 3 apart, and 100; equal weights, and opposite ones.
    assert [layer.margin for layer in found] == pytest.approx([math.log(3.0), 100.0])
    assert [layer.cosine for layer in found] == pytest.approx([1.0, -1.0])
    assert [layer.number for layer in found] == [1, 3]
    assert [layer.load for layer in found] == [(1.0, 0.0), (0.25, 0.75)]
    assert [layer.entropy for layer in found] == pytest.approx(
        [float(router_entropy(first, softmax(2, 1))), 0.0], abs=1e-6
    )
    assert all(isinstance(layer, LayerRouting) and isinstance(layer.load[0], float) for layer in found)


def test_the_z_loss_and_its_gradient_are_as_by_hand() -> None:
    # Sums of exponentials 4 and 4: their logarithms squared, and 2 ln 4 times the softmax over the two tokens.
    logits = torch.tensor([THREE_TO_ONE, ONE_TO_THREE], requires_grad=True)
    loss = z_loss(logits)
    assert float(loss.detach()) == pytest.approx(math.log(4.0) ** 2, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx(
        [math.log(4.0) * p for p in (0.75, 0.25, 0.25, 0.75)], rel=1e-6
    )


def test_the_gradient_of_the_balance_loss_is_as_by_hand() -> None:
    # All to the first, so the loss is 2 * mean of p1; d p1 / d z1 = p1 (1 - p1) = 3/16, and half of twice that for each
    # of two tokens.
    logits = torch.tensor([THREE_TO_ONE, THREE_TO_ONE], requires_grad=True)
    balance_loss(logits, softmax(2, 1)).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([3 / 16, -3 / 16] * 2, rel=1e-6)


def test_the_losses_of_two_halves_with_the_load_of_the_whole_have_the_whole_batchs_loss_as_mean() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    gate = softmax(4, 2)
    whole, load = balance_loss(logits, gate), expert_load(logits, gate)
    halves = [balance_loss(half, gate, load) for half in logits.split(32)]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-6)
    assert float(sum(balance_loss(half, gate) for half in logits.split(32)) / 2) != pytest.approx(
        float(whole), rel=1e-4
    )


def test_the_margin_is_between_the_last_chosen_and_the_next() -> None:
    assert float(
        router_margin(torch.tensor([[5.0, 1.0, 3.0, 2.5], [0.0, 1.0, 1.0, 1.0]]), softmax(4, 2))
    ) == pytest.approx((0.5 + 0.0) / 2)
    assert float(router_margin(torch.tensor([[5.0, 1.0]]), softmax(2, 2))) == 0.0


def test_the_cosine_is_the_mean_over_pairs() -> None:
    weights = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    pairs = [F.cosine_similarity(weights[a].flatten(), weights[b].flatten(), dim=0) for a in range(4) for b in range(a)]
    assert float(expert_cosine(weights)) == pytest.approx(float(sum(pairs) / 6), rel=1e-5)
    assert float(expert_cosine(weights[:1])) == 1.0


def test_the_cosine_of_near_copies_is_more_than_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    base = 0.2 * torch.randn(300_000, generator=draw)
    experts = torch.stack([base + size * torch.randn(300_000, generator=draw) for size in (0.0, 1e-4, 2e-4)])
    pairs = [F.cosine_similarity(experts[a].double(), experts[b].double(), dim=0) for a in range(3) for b in range(a)]
    assert 1 - float(expert_cosine(experts)) == pytest.approx(1 - float(sum(pairs) / 3), rel=1e-3)
    assert 1 - float(expert_cosine(experts)) == pytest.approx(4.2e-7, rel=0.1)
    assert float(expert_cosine(base.expand(3, -1))) == 1.0


def test_watching_leaves_no_gradient() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert not expert_load(logits, softmax(3, 1)).requires_grad
    assert not router_entropy(logits, softmax(3, 1)).requires_grad


# Sigmoid scores with a selection bias

SIGMOIDS = [math.log(3.0), 0.0, -math.log(3.0)]  # logits of scores 3/4, 1/2 and 1/4, which sum to 3/2
NO_BIAS = torch.zeros(3)


def sigmoid(num_experts: int, k: int) -> Gate:
    return Gate(num_experts, TopK(k), "sigmoid", selection_bias=True)


def test_a_bias_chooses_other_experts_than_the_scores_do() -> None:
    logits = torch.tensor([SIGMOIDS, SIGMOIDS])
    assert expert_counts(logits, sigmoid(3, 1), NO_BIAS).tolist() == [2, 0, 0]
    assert expert_counts(logits, sigmoid(3, 1), torch.tensor([0.0, 0.26, 0.0])).tolist() == [
        0,
        2,
        0,
    ]  # 1/2 + .26 is more than 3/4
    assert expert_counts(logits, sigmoid(3, 1), torch.tensor([0.0, 0.24, 0.0])).tolist() == [2, 0, 0]
    assert expert_load(logits, sigmoid(3, 2), torch.tensor([-1.0, 0.0, 0.0])).tolist() == [0.0, 0.5, 0.5]


def test_a_bias_moves_by_the_rate_towards_the_mean_load() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    move_bias(bias, torch.tensor([9, 5, 1, 5]), 0.125)  # the mean is 5
    assert bias.tolist() == [0.375, 0.0, -0.125, 0.0]
    move_bias(bias, torch.tensor([0, 0, 0, 3]), 0.125)  # a mean of 3/4, which no load has
    assert bias.tolist() == [0.5, 0.125, 0.0, -0.125]


def test_a_bias_that_moves_step_by_step_balances_tokens_that_all_want_one_expert() -> None:
    logits = torch.randn(512, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    bias = torch.zeros(4)
    assert float(expert_load(logits, sigmoid(4, 1), bias).max()) > 0.7
    for _ in range(400):
        move_bias(bias, expert_counts(logits, sigmoid(4, 1), bias), 2e-3)
    assert expert_load(logits, sigmoid(4, 1), bias).tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_the_balance_loss_of_sigmoid_scores_is_as_by_hand() -> None:
    # Both tokens to the first by their scores, whatever a bias chooses: 3 * (1 * (3/4) / (3/2)) = 3/2.
    logits = torch.tensor([SIGMOIDS, SIGMOIDS])
    assert float(balance_loss(logits, sigmoid(3, 1))) == pytest.approx(1.5, rel=1e-6)
    # One to each of two: 3 * (1/2 * (1/2 + 1/6) / 2 * 2) = 1, the third having 1/3 of the probability and no load.
    mirrored = torch.tensor([SIGMOIDS, SIGMOIDS[::-1]])
    assert float(balance_loss(mirrored, sigmoid(3, 1))) == pytest.approx(1.0, rel=1e-6)


def test_the_balance_loss_of_sigmoid_scores_is_that_of_equations_17_to_20() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 2
    scores = [[1 / (1 + math.exp(-z)) for z in row] for row in logits.tolist()]
    expected = 0.0
    for i in range(6):
        f = 6 / (2 * 40) * sum(i in sorted(range(6), key=lambda e: -row[e])[:2] for row in scores)
        expected += f * sum(row[i] / sum(row) for row in scores) / 40
    assert float(balance_loss(logits, sigmoid(6, 2))) == pytest.approx(expected, rel=1e-5)


def test_entropy_and_margin_of_sigmoid_scores_are_as_by_hand() -> None:
    logits = torch.tensor([SIGMOIDS])
    # 1/2, 1/3 and 1/6 of their sum.
    assert float(router_entropy(logits, sigmoid(3, 1))) == pytest.approx(
        math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6, rel=1e-6
    )
    assert float(router_margin(logits, sigmoid(3, 1), NO_BIAS)) == pytest.approx(0.25)
    assert float(router_margin(logits, sigmoid(3, 1), torch.tensor([0.0, 0.5, 0.0]))) == pytest.approx(
        0.25
    )  # 1 and 3/4
    bias = torch.tensor([0.0, 0.5, 0.0])
    load = expert_load(logits, sigmoid(3, 1), bias)
    (found,) = describe_routing((0,), (load,), (logits,), (torch.ones(3, 2),), (bias,), sigmoid(3, 1))
    assert found.load == (0.0, 1.0, 0.0)
