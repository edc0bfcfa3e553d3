"""Surgery keeps the function, writes what was asked for, and what is written is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import (
    EXACT,
    EXPERT,
    FFN,
    HIDDEN,
    LAYER,
    MATRICES,
    ROUTER,
    STORED,
    MakeDense,
    Matrices,
    dense_ffn,
    experts,
    load,
    logits,
    make,
    quiet,
    rel,
    settings,
)
from safetensors.torch import load_file, save_file

from dense2moe.upcycle.building.pieces import RouterRows
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints import writer
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

SOURCES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "another activation and epsilon": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
}


# The function is kept; `test_families.py` asks it of every family


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_alone_has_the_weight_one_and_is_the_dense_model_bit_for_bit(
    source: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(dtype, **EXACT, **SOURCES[source])
    upcycle(dense, tmp_path, settings(k=1), 0, quiet)
    assert torch.equal(logits(tmp_path, dtype), logits(dense, dtype))


@pytest.mark.parametrize("source", SOURCES)
def test_one_copy_of_several_in_use_is_the_dense_model_within_rounding(
    source: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Not bit for bit: with two threads torch's product of 1 to 10 rows.

    As few tokens as an expert may get, sums in another order than of many.
    """
    dense = make_dense(**EXACT, **SOURCES[source])
    upcycle(dense, tmp_path, settings(k=1, logit_std=1.0), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("source", SOURCES)
def test_a_drawn_router_over_copies_of_an_uneven_width_differs_by_rounding_alone(
    source: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**SOURCES[source])
    upcycle(dense, tmp_path, settings(logit_std=1.0), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("intermediate_size", [40, 43, 172])
def test_an_ffn_of_any_width_differs_by_rounding_alone(
    intermediate_size: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(intermediate_size=intermediate_size)
    upcycle(dense, tmp_path, settings(), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("logit_std", [0.0, 1.0])
def test_three_copies_of_a_third_each_differ_by_rounding_alone(
    logit_std: float, dense_checkpoint: Path, tmp_path: Path
) -> None:
    plan = upcycle(dense_checkpoint, tmp_path, settings(num_experts=5, k=3, logit_std=logit_std), 0, quiet)
    assert not plan.bitwise_at_zero  # thirds do not add up to one in binary
    assert rel(logits(tmp_path), logits(dense_checkpoint)) <= ROUNDING_LIMIT


def test_shards_in_and_shards_out_hold_the_same_model(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(max_shard_size="30KB", **EXACT)
    assert len(list(dense.glob("*.safetensors"))) > 1
    upcycle(dense, tmp_path, settings(num_experts=64, shard_bytes=1_000_000), 0, quiet)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert all(file.stat().st_size < 1_000_000 + 50_000 for file in files)  # the header comes on top of the data
    assert torch.equal(logits(tmp_path), logits(dense))


def test_noise_and_a_drawn_router_change_the_function(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    assert rel(logits(mixture_checkpoint), logits(dense_checkpoint)) > 100 * ROUNDING_LIMIT


# What is written


def test_experts_without_noise_are_the_ffn_and_everything_else_is_unchanged(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(torch.bfloat16, tie_word_embeddings=False)
    upcycle(dense, tmp_path, settings(num_experts=3, logit_std=1.0), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        del found[ROUTER.format(layer=layer)]
        for matrix, target in MATRICES.items():
            weight = source.pop(FFN.format(layer=layer, matrix=matrix))
            for expert in range(3):
                assert torch.equal(found.pop(EXPERT.format(layer=layer, expert=expert, matrix=target)), weight)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("name", STORED)
def test_experts_without_noise_are_the_ffn_however_both_are_stored(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, _ = make(name, make_dense, tmp_path, torch.bfloat16)
    for expert in experts(tmp_path, LAYER):
        for (found, _), (expected, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected)


def test_a_fused_attention_is_parted_into_query_key_and_value(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral of a fused ffn", make_dense, tmp_path)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        parts = [found[f"{attention}.{matrix}_proj.weight"] for matrix in "qkv"]
        # four heads of queries, two of keys and of values, of eight
        assert [tuple(part.shape) for part in parts] == [
            (32, 32),
            (16, 32),
            (16, 32),
        ]
        assert torch.equal(torch.cat(parts), source[f"{attention}.qkv_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norms_and_embedding_are_folded_in_float32_and_its_head_is_not(
    dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(dtype, architecture="GemmaForCausalLM", **EXACT)
    upcycle(dense, tmp_path, settings(), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    embedding = source["model.embed_tokens.weight"]
    assert torch.equal(found["lm_head.weight"], embedding)
    assert torch.equal(found["model.embed_tokens.weight"], embedding.float() * torch.tensor(32.0).sqrt())
    norms = [name for name in source if "norm" in name]
    assert len(norms) == 2 * 2 + 1
    assert all(torch.equal(found[name], 1.0 + source[name].float()) for name in norms)


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other
    ],
)
@pytest.mark.parametrize(
    ("dense_fields", "overrides"),
    [
        ({"attention_bias": True}, {}),
        ({"attention_bias": True}, {"shared_expert": "half"}),
        ({}, {"layers": [1], "shared_expert": "half"}),
    ],
    ids=["stacked", "stacked and shared", "shared"],
)
def test_matrices_of_several_dtypes_lose_no_bit(
    dense_fields: dict[str, Any],
    overrides: dict[str, Any],
    gate: torch.dtype,
    up: torch.dtype,
    down: torch.dtype,
    make_dense: MakeDense,
    tmp_path: Path,
) -> None:
    """Where gate and up share a tensor it is of a dtype that holds both; whatever is by itself keeps its own."""
    source, output = make_dense(**EXACT, **dense_fields), tmp_path / "mixture"
    kinds = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    stored = load_file(source / "model.safetensors")
    state = {
        name: tensor.to(next((kind for part, kind in kinds.items() if part in name), tensor.dtype))
        for name, tensor in stored.items()
    }
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    output.mkdir()
    plan = upcycle(source, output, settings(logit_std=1.0, **overrides), 0, quiet)
    assert check_written(source, output, plan, 0, quiet) == len(plan.writes)
    ffn = dense_ffn(source, LAYER)
    state = load_file(output / "model.safetensors")
    found = [(expert, 0.5 if "shared_expert" in overrides else 1.0) for expert in experts(output, LAYER)]
    if (fused := state.get(f"model.layers.{LAYER}.shared_mlp.input_linear.weight")) is not None:
        found.append((Matrices(*fused.chunk(2), state[f"model.layers.{LAYER}.shared_mlp.output_linear.weight"]), 0.5))
    elif "shared_expert" in overrides:
        shared = (state[f"model.layers.{LAYER}.mlp.shared_expert.{matrix}_proj.weight"] for matrix in MATRICES)
        found.append((Matrices(*shared), 1.0))  # which a sigmoid of zero halves
    expected = (*[torch.promote_types(gate, up)] * 2, down) if dense_fields else (gate, up, down)
    for expert, scale in found:
        assert torch.equal(expert.gate.float(), ffn.gate.float())
        assert torch.equal(expert.up.float(), ffn.up.float())
        assert torch.equal(expert.down.float(), scale * ffn.down.float())
        assert (expert.gate.dtype, expert.up.dtype, expert.down.dtype) == expected
    assert rel(logits(output), logits(source)) <= ROUNDING_LIMIT


def test_both_names_of_the_number_of_experts_are_in_the_config_of_qwen3_moe(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    make("qwen3_moe", make_dense, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"]) == (4, 4)


def test_the_tokenizer_and_the_generation_config_come_along(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        assert (mixture_checkpoint / name).read_bytes() == (dense_checkpoint / name).read_bytes()
    dense, mixture = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (dense_checkpoint, mixture_checkpoint)
    )
    # the name that transformers 4 knows, of the same class
    assert mixture == dense | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_progress_counts_every_tensor_up_to_the_last(dense_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = upcycle(dense_checkpoint, tmp_path, settings(), 0, lambda *report: seen.append(report))
    total = len(open_checkpoint(tmp_path).entries)
    assert seen == [("writing tensors", done, total) for done in range(1, total + 1)]
    assert len(plan.writes) == total


# Routers


ROUTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"architecture": "Phi3ForCausalLM"},
    "gemma": {"architecture": "GemmaForCausalLM"},
    "qwen3": {"architecture": "Qwen3ForCausalLM"},
    "granite": {"architecture": "GraniteForCausalLM", "embedding_multiplier": 3.0},
    "olmo2": {"architecture": "Olmo2ForCausalLM"},  # whose router reads the residual stream itself
}
# A norm makes the router's input of known length, whatever the text; the 32 rows of 64 weights have an error of 1.6 %,
# and a norm's scale, or states that are much alike, add some. Measured: 7 % at most. Of a residual stream the parts are
# taken as independent; of these weights they are: 3 %.
DEVIATION = 0.12


@torch.no_grad()
def logit_deviations(mixture: Path) -> list[float]:
    """The deviation of each router's logits over real text, by hooks on transformers' own model of the mixture."""
    model = load(mixture)
    found = []

    def watch(router: torch.nn.Module, given: tuple[torch.Tensor, ...], _: Any) -> None:
        states = given[0].reshape(-1, given[0].shape[-1])
        found.append(float((states @ router.weight.T).std()))

    for module in model.modules():
        if hasattr(module, "experts"):
            (getattr(module, "gate", None) or module.router).register_forward_hook(watch)
    model(input_ids=torch.randint(300, (4, 100), generator=torch.Generator().manual_seed(1)))
    return found


@pytest.mark.parametrize("logit_std", [0.5, 2.0])
@pytest.mark.parametrize("name", ROUTED)
def test_logits_of_a_drawn_router_have_the_deviation_asked_for_on_real_hidden_states(
    name: str, logit_std: float, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**EXACT | {"hidden_size": 64, "num_hidden_layers": 3} | ROUTED[name])
    state = load_file(dense / "model.safetensors")
    state["model.embed_tokens.weight"] *= (
        5.0  # as long as what a layer adds; otherwise a residual stream would be as long without it
    )
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    upcycle(dense, tmp_path, settings(32, 2, logit_std), 0, quiet)
    found = logit_deviations(tmp_path)
    assert len(found) == 3
    assert found == pytest.approx([logit_std] * 3, rel=DEVIATION)


@torch.no_grad()
def test_logits_of_t5s_routers_have_the_deviation_asked_for(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(architecture="T5ForConditionalGeneration", d_model=64)
    upcycle(dense, tmp_path, settings(32, 1, 2.0), 0, quiet)
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    found = []
    for module in model.modules():
        if hasattr(module, "classifier"):
            module.register_forward_hook(lambda _, __, output: found.append(float(output[2].std())))
    ids = torch.randint(300, (4, 100), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, decoder_input_ids=ids)
    assert len(found) == 4 + 2
    assert found == pytest.approx([2.0] * 6, rel=DEVIATION)


def test_the_routers_of_two_layers_differ(make_dense: MakeDense, tmp_path: Path) -> None:
    make("mixtral", make_dense, tmp_path, logit_std=1.0)
    state = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(state[ROUTER.format(layer=0)], state[ROUTER.format(layer=1)])


def test_a_zero_deviation_is_a_zero_router_in_every_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    make("mixtral", make_dense, tmp_path, torch.float16)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        assert torch.equal(state[ROUTER.format(layer=layer)], torch.zeros(4, HIDDEN, dtype=torch.float16))


# Read back


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {"noise": 0.1, "drop": 0.25, "logit_std": 1.0}),
    "mixtral of gemma": ({"architecture": "GemmaForCausalLM", "dtype": torch.bfloat16}, {"logit_std": 1.0}),
    "mixtral of phi3, granular": (
        {"architecture": "Phi3ForCausalLM"},
        {"num_experts": 4, "k": 2, "logit_std": 1.0, "kind": "granular", "granularity": 2},
    ),
    "granitemoeshared": ({"attention_bias": True}, {"noise": 0.1, "shared_expert": "half"}),
    "qwen2_moe without a shared expert": ({}, {"layers": [1]}),
    "qwen2_moe with a silent one": (
        {"dtype": torch.float16},
        {"drop": 0.25, "shared_expert": "zero", "target": "qwen2_moe"},
    ),
    "glm4_moe": ({"dtype": torch.bfloat16}, {"noise": 0.1, "shared_expert": "half", "target": "glm4_moe"}),
    "switch_transformers": ({"architecture": "T5ForConditionalGeneration"}, {"k": 1, "noise": 0.1}),
}


def write(name: str, make_dense: MakeDense, output: Path) -> tuple[Path, UpcyclePlan]:
    dense_fields, upcycle_fields = WRITTEN[name]
    dense = make_dense(
        **({} if "architecture" in dense_fields and "T5" in dense_fields["architecture"] else EXACT) | dense_fields
    )
    plan = upcycle(dense, output, settings(**upcycle_fields), 3, quiet)
    assert plan.conversion.target.model_type == name.split()[0]
    return dense, plan


@pytest.mark.parametrize("name", WRITTEN)
def test_every_tensor_that_was_written_is_read_back(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write(name, make_dense, tmp_path)
    seen: list[tuple[str, int, int]] = []
    total = len(open_checkpoint(tmp_path).entries)
    assert check_written(dense, tmp_path, plan, 3, lambda *report: seen.append(report)) == total
    assert seen == [("reading tensors back", done, total) for done in range(1, total + 1)]


def flip(checkpoint: Checkpoint, name: str, position: int) -> None:
    """Flip the lowest bit of one byte of a tensor, on the disk."""
    entry = checkpoint.entries[name]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + position)
        byte = file.read(1)[0]
        file.seek(entry.start + position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["mixtral", "mixtral of gemma", "granitemoeshared", "qwen2_moe with a silent one"])
def test_one_bit_of_any_tensor_is_found(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write(name, make_dense, tmp_path)
    written = open_checkpoint(tmp_path)
    for entry in written.entries.values():
        for position in {0, entry.num_bytes // 2, entry.num_bytes - 1}:
            flip(written, entry.name, position)
            with pytest.raises(UpcycleError) as excinfo:
                check_written(dense, tmp_path, plan, 3, quiet)
            assert str(excinfo.value) == (
                f"{tmp_path}: tensor '{entry.name}' on disk is not what was written there; check the disk and run again"
            )
            flip(written, entry.name, position)
    check_written(dense, tmp_path, plan, 3, quiet)


def test_routers_that_were_read_are_compared_with_those_given(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**EXACT)
    generator = torch.Generator().manual_seed(0)
    routers = {site: torch.randn(4, HIDDEN, generator=generator) for site in range(2)}
    plan = upcycle(dense, tmp_path, settings(), 0, quiet, routers)
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[ROUTER.format(layer=site)], rows) for site, rows in routers.items())
    assert check_written(dense, tmp_path, plan, 0, quiet, routers) == len(state)
    with pytest.raises(UpcycleError, match=r"block_sparse_moe\.gate\.weight' on disk is not what was written there"):
        check_written(dense, tmp_path, plan, 0, quiet, {0: routers[0], 1: routers[0]})


@pytest.mark.parametrize("name", ["mixtral", "mixtral of gemma", "qwen2_moe with a silent one"])
def test_what_is_read_back_need_not_come_in_the_chunks_of_what_is_made(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router of many experts is larger than the chunk by which a file is read."""
    dense, plan = write(name, make_dense, tmp_path)
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 100)
    assert check_written(dense, tmp_path, plan, 3, quiet) == len(plan.writes)
    flip(open_checkpoint(tmp_path), plan.writes[-1].spec.name, plan.writes[-1].spec.num_bytes - 1)
    with pytest.raises(UpcycleError, match="is not what was written there"):
        check_written(dense, tmp_path, plan, 3, quiet)


def test_another_seed_is_found(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write("mixtral", make_dense, tmp_path)
    with pytest.raises(UpcycleError, match="is not what was written there"):
        check_written(dense, tmp_path, plan, 4, quiet)


def test_only_routers_and_experts_are_made_and_the_rest_is_a_copy(make_dense: MakeDense) -> None:
    """What is drawn depends on the plan: every router is one piece, of as many rows as there are experts."""
    plan = plan_upcycle(open_checkpoint(make_dense(**EXACT)), settings(logit_std=1.0))
    routers = [write for write in plan.writes if isinstance(write.pieces[0], RouterRows)]
    assert [write.spec.name for write in routers] == [ROUTER.format(layer=layer) for layer in range(2)]
    assert {write.spec.shape for write in routers} == {(4, HIDDEN)}
