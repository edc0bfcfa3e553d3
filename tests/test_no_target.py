"""Sparse architectures that nothing becomes: what is wrong with each; a test fails when transformers mends it."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from dense2moe.upcycle.models.refused import NO_TARGET
from dense2moe.upcycle.models.table import TARGETS

NUM_EXPERTS = 4


def test_each_is_an_architecture_of_transformers_and_no_target() -> None:
    assert set(NO_TARGET) <= set(transformers.CONFIG_MAPPING)
    assert not set(NO_TARGET) & {target.model_type for target in TARGETS}


@torch.no_grad()
def test_nllb_moe_sends_every_token_to_experts_0_and_1() -> None:
    """Its experts read the mask of the chosen one, of zeros and ones, as the experts' numbers."""
    config = transformers.NllbMoeConfig(
        d_model=16, num_experts=NUM_EXPERTS, router_bias=False, moe_eval_capacity_token_fraction=-1.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = NllbMoeSparseMLP(config, 16).eval()
        tokens = torch.randn(1, 64, 16)
    chosen, _, logits = layer.router(tokens.view(-1, 16))
    assert set(chosen.argmax(-1).tolist()) == set(range(NUM_EXPERTS))  # so its router does choose among all
    assert torch.equal(chosen.argmax(-1), logits.argmax(-1))
    visited: set[int] = set()
    for number in range(NUM_EXPERTS):
        layer.experts[f"expert_{number}"].register_forward_hook(lambda *_, number=number: visited.add(number))
    layer(tokens)
    assert visited == {0, 1}, "NLLB-MoE calls other experts now: it may become a target"


HIDDEN, FFN, VOCABULARY = 64, 64, 96


def olmo(dtype: torch.dtype) -> transformers.PreTrainedModel:
    config = transformers.OlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        clip_qkv=8.0,
        pad_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.OlmoForCausalLM(config).eval().to(dtype)


def dbrx_config(**attention: float) -> transformers.DbrxConfig:
    return transformers.DbrxConfig(
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, **attention},
        ffn_config={"ffn_hidden_size": FFN, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2},
    )


def dbrx_of(dense: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """OLMo's weights in DBRX, with copies for experts and a zero router."""
    state, found = dense.state_dict(), {"transformer.norm_f.weight": torch.ones(HIDDEN)}
    found["transformer.wte.weight"] = state["model.embed_tokens.weight"]
    found["lm_head.weight"] = state["lm_head.weight"]
    for layer in range(2):
        old, new = f"model.layers.{layer}.", f"transformer.blocks.{layer}."
        attention, experts = f"{new}norm_attn_norm.attn.", f"{new}ffn.experts.mlp."
        rows = [state[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"{attention}Wqkv.weight"] = torch.cat(rows)
        found[f"{attention}out_proj.weight"] = state[f"{old}self_attn.o_proj.weight"]
        found |= {f"{new}norm_attn_norm.norm_{number}.weight": torch.ones(HIDDEN) for number in (1, 2)}
        found[f"{new}ffn.router.layer.weight"] = torch.zeros(NUM_EXPERTS, HIDDEN)
        found[f"{experts}w1"] = state[f"{old}mlp.gate_proj.weight"].repeat(NUM_EXPERTS, 1)
        found[f"{experts}v1"] = state[f"{old}mlp.up_proj.weight"].repeat(NUM_EXPERTS, 1)
        found[f"{experts}w2"] = state[f"{old}mlp.down_proj.weight"].T.repeat(NUM_EXPERTS, 1)
    model = transformers.DbrxForCausalLM(dbrx_config(clip_qkv=8.0, rope_theta=10_000.0)).eval()
    model.load_state_dict(found)
    return model.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dbrx_is_olmo_in_float32_alone(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        dense = olmo(dtype)
        mixture = dbrx_of(dense, dtype)
        ids = torch.randint(VOCABULARY, (2, 40))
    # `.to` would have rounded the frequencies of both, which are float32 in every dtype
    for model in (dense, mixture):
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.compute_default_rope_parameters(model.config)[0]
    expected, found = (model(ids).logits.float() for model in (dense, mixture))
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:  # measured 2e-2 to 3e-2
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error > 5e-3, "DBRX no longer rounds the cosines of its rotary embedding: it may become OLMo's target"


def test_dbrx_fails_without_the_fields_that_olmo_need_not_have() -> None:
    with pytest.raises(AttributeError, match="rope_theta"):
        transformers.DbrxForCausalLM(dbrx_config(clip_qkv=8.0))
    model = transformers.DbrxForCausalLM(dbrx_config(rope_theta=10_000.0))
    with pytest.raises(RuntimeError, match="At least one of 'min' or 'max' must not be None"):
        model(torch.ones(1, 2, dtype=torch.int64))
