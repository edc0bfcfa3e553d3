"""A LoRA adapter laid over its base is the checkpoint that peft itself merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import EXACT, MakeDense, experts, logits, quiet
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints.adapter import open_source
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# peft asks transformers for what it has renamed, and warns of what it saves
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`",
    "ignore:fan_in_fan_out is set to True",
    "ignore:Setting `save_embedding_layers`",
)

UNTIED = {**EXACT, "tie_word_embeddings": False}
LINEAR = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention alone": {"target_modules": ["q_proj", "o_proj"]},
    "rank-stabilized": {"use_rslora": True},
    "ranks and alphas by module": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5, r"^model.layers.0.mlp.down_proj": 3},
        "alpha_pattern": {"up_proj": 32, "layers.0.self_attn.v_proj": 1},
    },
    "rank-stabilized with ranks by module": {"use_rslora": True, "rank_pattern": {"up_proj": 6}},
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilized": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "head and a norm trained whole": {"modules_to_save": ["lm_head", "norm"]},
    "an FFN matrix trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "some layers": {"layers_to_transform": [1]},
    "stored the other way round": {"fan_in_fan_out": True},
}


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """An adapter of a base with drawn weights, as peft saves it, and the tensors of what peft merges of it."""

    def make(base: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **overrides}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.data += 0.1 * noise.to(parameter.dtype)
        directory = tmp_path / "adapter"
        model.save_pretrained(directory)
        merged = model.merge_and_unload()
        return directory, {name: tensor.clone() for name, tensor in merged.state_dict().items()}

    return make


def edited(directory: Path, **fields: Any) -> Path:
    """An adapter whose config says something else."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_over_its_base_is_what_peft_merges(
    kind: str, make_dense: MakeDense, make_adapter: Callable[..., Any]
) -> None:
    base = make_dense(**UNTIED)
    adapter, merged = make_adapter(base, **KINDS[kind])
    source = open_source(adapter, open_checkpoint(base))
    own = load_file(base / "model.safetensors")
    assert source.entries.keys() == merged.keys()
    changed = [name for name in merged if not torch.equal(merged[name], own[name])]
    assert changed
    for name, expected in merged.items():
        found = torch.cat([*source.read_chunks(name)])
        assert found.dtype == expected.dtype
        # products summed in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        torch.testing.assert_close(source.read_rows(name, 3, 9), found[3:9], rtol=0, atol=1e-6)
        assert torch.equal(source.read(name), found)


def test_a_bfloat16_base_stays_bfloat16(make_dense: MakeDense, make_adapter: Callable[..., Any]) -> None:
    base = make_dense(torch.bfloat16, **UNTIED)
    adapter, merged = make_adapter(base, torch.bfloat16)
    source = open_source(adapter, open_checkpoint(base))
    name = "model.layers.0.mlp.up_proj.weight"
    found = source.read(name)
    assert found.dtype == torch.bfloat16
    # peft rounds the change as well as the sum, each to 8 bits
    torch.testing.assert_close(found.float(), merged[name].float(), rtol=2**-7, atol=2**-9)


def test_a_mixture_of_an_adapter_is_the_mixture_of_its_merged_checkpoint(
    make_dense: MakeDense, make_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_dense(**UNTIED)
    adapter, merged = make_adapter(base, use_dora=True)
    whole = AutoModelForCausalLM.from_pretrained(base)
    whole.load_state_dict(merged)
    whole.save_pretrained(tmp_path / "whole")
    settings = UpcycleConfig(base_expert="routed", router=RouterConfig(logit_std=0.0))
    found = []
    for name, source in (("of-adapter", adapter), ("of-whole", tmp_path / "whole")):
        output = tmp_path / name
        output.mkdir()
        plan = upcycle(base, output, settings, 0, quiet, sources={"tuned": source})
        check_written(base, output, plan, 0, quiet, sources={"tuned": source})
        found.append((logits(output), experts(output, 1, 2)[1].up))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


# Refusals


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        open_source(adapter, open_checkpoint(base))
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; must be LORA"),
        ({"bias": "all"}, "bias is all, which is not known here"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is ['experts.up']"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1]"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"a_field_of_next_year": 0.5}, "a_field_of_next_year is 0.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which takes a part out of the base's weights"),
        ({"r": 5}, "it must be a float of shape [5, 64]"),
        ({"r": 0}, "r is 0; must be a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha is x; must be a positive number"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is {'q_proj': 'x'}; must be a mapping"),
        ({"rank_pattern": {"(a+)+": 4}}, "is too intricate a pattern"),
        ({"rank_pattern": {"(a": 4}}, "is no pattern"),
        ({"use_dora": True}, "by adapter_config.json it must have lora_A, lora_B, lora_magnitude_vector"),
    ],
)
def test_what_is_not_known_of_an_adapter_is_refused_by_name(
    fields: dict[str, Any], said: str, make_dense: MakeDense, make_adapter: Callable[..., Any]
) -> None:
    base = make_dense(**UNTIED)
    adapter, _ = make_adapter(base)
    assert said in refusal(edited(adapter, **fields), base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_embedding_is_not_changed_on_one_side_alone(
    make_dense: MakeDense, make_adapter: Callable[..., Any]
) -> None:
    base = make_dense(**EXACT)
    adapter, _ = make_adapter(base, target_modules=["embed_tokens"])
    assert "changes the embedding, which is the base's head as well" in refusal(adapter, base)


def test_dora_of_an_embedding_is_refused(make_dense: MakeDense, make_adapter: Callable[..., Any]) -> None:
    base = make_dense(**UNTIED)
    adapter, _ = make_adapter(base, use_dora=True, target_modules=["embed_tokens", "q_proj"])
    said = "use_dora is true, and 'model.embed_tokens' is an embedding, whose norms are by column; merge it by peft's"
    assert said in refusal(adapter, base)


def test_an_adapter_with_added_tokens_is_refused(make_dense: MakeDense, make_adapter: Callable[..., Any]) -> None:
    """As peft writes one after `resize_token_embeddings`, whose head was trained whole."""
    base = make_dense(**UNTIED)
    adapter, _ = make_adapter(base, modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    (name,) = (name for name in state if "lm_head" in name)
    save_file({**state, name: torch.ones(304, 32)}, path)
    said = (
        f"tensor '{name}' has shape [304, 32]; the base's has [300, 32]; an adapter must be of its base, without added"
    )
    assert said in refusal(adapter, base)


def test_an_adapter_of_another_model_is_refused(make_dense: MakeDense, make_adapter: Callable[..., Any]) -> None:
    adapter, _ = make_adapter(make_dense(**UNTIED))
    narrow, shallow = make_dense(intermediate_size=32), make_dense(**UNTIED, num_hidden_layers=1)
    assert "of shape [4, 64]; by the base and adapter_config.json it must be a float of shape [4, 32]" in refusal(
        adapter, narrow
    )
    assert "'model.layers.1.mlp.down_proj.weight', which the base" in refusal(adapter, shallow)


def test_a_tensor_of_no_kind_is_refused(make_dense: MakeDense, make_adapter: Callable[..., Any]) -> None:
    base = make_dense(**UNTIED)
    adapter, _ = make_adapter(base)
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({**state, "base_model.model.model.norm.lora_C": torch.ones(1)}, adapter / "adapter_model.safetensors")
    assert "lora_C' is none that peft's LoRA has" in refusal(adapter, base)
