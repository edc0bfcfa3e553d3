"""One meaning of a gate in torch: as transformers routes, and as rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    Cohere2MoeConfig,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeTopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Gate
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dense2moe.upcycle.checkpoints.loaded import router_weights, selection_biases
from dense2moe.upcycle.gates.choice import choice_margin, choose
from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.gates.routes import Routes, route
from dense2moe.upcycle.gates.scores import selection_scores
from dense2moe.upcycle.models.routing import assume_gate, find_gate
from dense2moe.upcycle.models.table import TARGETS

HIDDEN, EXPERTS = 16, 8
SIGMOID = 0.0


def rows_of(routes: Routes) -> list[dict[int, float]]:
    """By token, the weight of each expert that it visits."""
    found: list[dict[int, float]] = [{} for _ in range(routes.num_tokens)]
    for token, expert, weight in zip(
        routes.token.tolist(), routes.expert.tolist(), routes.weight.tolist(), strict=True
    ):
        found[token][expert] = weight
    return found


def glm4(renormalize: bool, scale: float) -> tuple[Any, Any]:
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=renormalize,
        routed_scaling_factor=scale,
    )
    return config, Glm4MoeTopkRouter(config)


def qwen3(renormalize: bool, scale: float) -> tuple[Any, Any]:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=renormalize)
    return config, Qwen3MoeTopKRouter(config)


def cohere2(renormalize: bool, scale: float) -> tuple[Any, Any]:
    """By sigmoids, where it may leave weights as they are, and by the softmax that targets have otherwise."""
    selection = "softmax" if scale == 1.0 else "sigmoid"
    config = Cohere2MoeConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        expert_selection_fn=selection,
        norm_topk_prob=renormalize,
    )
    return config, Cohere2MoeTopKRouter(config)


def ernie(renormalize: bool, scale: float) -> tuple[Any, Any]:
    config = Ernie4_5_MoeConfig(hidden_size=HIDDEN, moe_num_experts=EXPERTS, moe_k=3)
    return config, Ernie4_5_MoeTopKRouter(config)


def hunyuan(renormalize: bool, scale: float) -> tuple[Any, Any]:
    config = HunYuanMoEV1Config(hidden_size=HIDDEN, num_experts=EXPERTS, moe_topk=3)
    return config, HunYuanMoEV1Gate(config)


def mixtral(renormalize: bool, scale: float) -> tuple[Any, Any]:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=3)
    return config, MixtralTopKRouter(config)


@pytest.mark.parametrize(
    ("make", "renormalize", "scale"),
    [
        (mixtral, True, 1.0),
        (qwen3, True, 1.0),
        (qwen3, False, 1.0),
        (glm4, True, 1.0),
        (glm4, False, 2.5),
        (cohere2, False, 1.0),
        (cohere2, False, SIGMOID),
        (ernie, True, 1.0),
        (hunyuan, True, 1.0),
    ],
)
@pytest.mark.parametrize("shift", [0.0, -30.0, -200.0])
def test_routes_are_those_of_transformers(make: Any, renormalize: bool, scale: float, shift: float) -> None:
    """Whatever the logits are: at -200 every sigmoid is zero in float32, and so is every weight."""
    config, router = make(renormalize, scale)
    generator = torch.Generator().manual_seed(0)
    gate = find_gate(config)
    assert gate is not None
    layer = torch.nn.Module()
    layer.experts, layer.gate = torch.nn.Module(), router
    with torch.no_grad():
        (weight,) = router_weights(layer)
        weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) / 4)
        weight[:, 0] = shift
        (bias,) = selection_biases(layer)
        assert (bias is not None) == gate.selection_bias
        if bias is not None:
            bias.copy_(torch.randn(EXPERTS, generator=generator) / 4)
        x = torch.randn(40, HIDDEN, generator=generator)
        x[:, 0] = 1.0
        logits, weights, chosen = router(x)
    expected = [dict(zip(c, w, strict=True)) for c, w in zip(chosen.tolist(), weights.tolist(), strict=True)]
    found = rows_of(route(logits, gate, bias))
    assert [set(token) for token in found] == [set(token) for token in expected]
    for ours, theirs in zip(found, expected, strict=True):
        # one float32 division by a sum in another order
        assert ours == pytest.approx(theirs, rel=1e-6, abs=0.0)
    if make is glm4 and shift == -200.0:
        assert all(weight == 0.0 for token in found for weight in token.values())


def test_lfm2_adds_a_millionth_to_the_sum_and_keeps_its_bias_beside_its_router() -> None:
    config = Lfm2MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=8)
    layer, generator = Lfm2MoeSparseMoeBlock(config), torch.Generator().manual_seed(0)
    gate = find_gate(config)
    assert gate is not None
    (weight,), (bias,) = router_weights(layer), selection_biases(layer)
    assert bias is not None
    with torch.no_grad():
        weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) / 4)
        bias.copy_(torch.randn(EXPERTS, generator=generator) / 4)
        logits, weights, chosen = layer.gate(torch.randn(40, HIDDEN, generator=generator), layer.expert_bias)
    found = rows_of(route(logits, gate, bias))
    assert [set(token) for token in found] == [set(token) for token in chosen.tolist()]
    for ours, theirs, experts in zip(found, weights.tolist(), chosen.tolist(), strict=True):
        assert [ours[expert] for expert in experts] == pytest.approx(theirs, rel=3e-6)


def test_a_bias_chooses_and_does_not_weigh() -> None:
    # Sigmoids 3/4, 1/2 and 1/4; the bias lifts the last above the second, and weights stay 3/4 and 1/4 over their sum.
    logits = torch.tensor([[math.log(3.0), 0.0, -math.log(3.0)]])
    bias = torch.tensor([0.0, 0.0, 0.5])
    gate = Gate(3, TopK(2), "sigmoid", scale=2.0, selection_bias=True)
    (found,) = rows_of(route(logits, gate, bias))
    assert found == pytest.approx({0: 1.5, 2: 0.5})
    assert selection_scores(logits, gate, bias)[0].tolist() == pytest.approx([0.75, 0.5, 0.75])
    assert selection_scores(logits, gate, None) is logits
    with pytest.raises(AssertionError, match="bias"):
        route(logits, gate, None)
    with pytest.raises(AssertionError, match="bias"):
        route(logits, Gate(3, TopK(2)), bias)


def test_a_table_has_a_row_a_token_and_weight_0_where_nothing_was_chosen() -> None:
    routes = Routes(
        torch.tensor([0, 2, 2, 2, 3]), torch.tensor([5, 1, 4, 0, 7]), torch.tensor([1.0, 0.5, 0.25, 2.0, 3.0]), 5
    )
    experts, weights = routes.as_table(3)
    assert weights.tolist() == [[1, 0, 0], [0, 0, 0], [0.5, 0.25, 2.0], [3, 0, 0], [0, 0, 0]]
    assert experts.tolist() == [[5, 0, 0], [0, 0, 0], [1, 4, 0], [7, 0, 0], [0, 0, 0]]


def test_rows_of_a_table_are_that_table() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, weights = torch.randint(0, 8, (6, 3), generator=generator), torch.rand(6, 3, generator=generator)
    routes = Routes.of_table(experts, weights)
    assert all(torch.equal(a, b) for a, b in zip(routes.as_table(3), (experts, weights), strict=True))


def test_the_choice_is_of_the_largest_and_its_margin_to_the_next() -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0], [3.0, 3.0, 0.0]])
    assert choose(scores, TopK(1))[0].tolist() == [1]
    assert [sorted(row) for row in choose(scores, TopK(2)).tolist()] == [[1, 2], [0, 1]]
    assert choice_margin(scores, TopK(2)).tolist() == [1.0, 3.0]
    assert choice_margin(scores, TopK(3)).tolist() == [math.inf, math.inf]
    assert Gate(4, TopK(3)).max_experts_per_token == 3


def test_a_gate_is_read_from_its_config() -> None:
    assert find_gate(LlamaConfig()) is None
    config, _ = glm4(False, 2.5)
    assert find_gate(config) == Gate(EXPERTS, TopK(3), "sigmoid", False, 2.5, selection_bias=True)
    assert assume_gate(config) == Gate(EXPERTS, TopK(3))


def test_an_architecture_has_a_selection_bias_where_its_gate_has_one() -> None:
    for target in TARGETS:
        gate = target.gate(CONFIG_MAPPING[target.model_type]())
        assert (target.find("selection_bias") is not None) == gate.selection_bias
