"""The plan as tables says what would be made: every tensor, every config value, and what it costs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from dense2moe.convert.artifact.sealing import resume_directory
from dense2moe.convert.checking import prepare
from dense2moe.convert.planning import plan_artifacts
from dense2moe.convert.preparation import Preparation
from dense2moe.convert.preview import plan_tables
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.walk import Walk

MakeDense = Callable[..., Path]

RECIPE = """\
source: {source}
data:
  source: {{kind: text, train: [text.txt], separator: '|'}}
  block_size: 32
upcycle: {upcycle}
finetune: {finetune}
variants: [float32, int8]
quantize: {{block_size: 16}}
parity: {{decode_steps: 8}}
"""


def prepared(source: Path, tmp_path: Path, upcycle: str, finetune: str = "{}") -> Preparation:
    (tmp_path / "text.txt").write_text(
        "|".join(f"line {number} of a text of many documents\n" for number in range(100))
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(source=source, upcycle=upcycle, finetune=finetune))
    return prepare(load_recipe(path), lambda what, done, total: None)


def rendered(table: Table) -> list[tuple[str, ...]]:
    """The rows of a table that is wide enough for all of its cells."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [tuple(str(cell).replace("\u00a0", " ") for cell in row) for row in rows]


def shown(source: Path, tmp_path: Path, upcycle: str) -> list[list[tuple[str, ...]]]:
    """Rows of the five tables: models, tensors, config, artifacts, memory.

    A tensor's has what it is made of as well, which is in a row below it.
    """
    tables = plan_tables(prepared(source, tmp_path, upcycle), tmp_path / "run", 200)
    models, tensors, *others = [rendered(table) for _, table in tables]
    joined: list[tuple[str, ...]] = []
    for row in tensors:
        if row[0]:
            joined.append((*row, "as it is"))
        else:
            assert (row[1][:2], row[2]) == ("← ", "")
            joined[-1] = (*joined[-1][:3], row[1][2:])
    return [models, joined, *others]


# Hidden 32, FFN 48, two layers, four heads of 8, two of them for keys and values, 300 tokens, tied.
DENSE = 300 * 32 + 32 + 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 32 + 32 + 3 * 32 * 48)
EXPERT, ROUTER = 3 * 32 * 48, 4 * 32


def test_a_llamas_plan_has_its_models(dense_checkpoint: Path, tmp_path: Path) -> None:
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4}")
    title, table = plan_tables(preparation, tmp_path, 200)[0]
    mixture = DENSE + 2 * (3 * EXPERT + ROUTER)
    assert title == "tiny: LlamaForCausalLM to MixtralForCausalLM"
    assert rendered(table) == [
        ("parameters", f"{DENSE:,}", f"{mixture:,}"),
        ("active a token", f"{DENSE:,}", f"{mixture - 2 * 2 * EXPERT:,}"),
        ("layers, with experts", "2", "2"),
        ("experts a layer, chosen", "—", "4, 2"),
        ("routers at the start", "—", "normal"),
        ("losses of routers", "—", "balance loss 0.01"),
        ("tensors", "20", "40"),
        ("bytes", decimal(4 * DENSE), decimal(4 * mixture)),
        ("source tensors dropped", "none", ""),
        ("computes what the dense one does", "", "yes"),
    ]


def test_a_llamas_plan_has_every_tensor_by_its_pattern(dense_checkpoint: Path, tmp_path: Path) -> None:
    _, tensors, *_ = shown(dense_checkpoint, tmp_path, "{num_experts: 4}")
    layer, ffn = "model.layers.N.", "model.layers.N.mlp.{}_proj.weight"
    assert sorted(tensors) == sorted(
        [
            ("1", "model.embed_tokens.weight", "300 × 32 float32", "as it is"),
            ("1", "model.norm.weight", "32 float32", "as it is"),
            ("2", f"{layer}input_layernorm.weight", "32 float32", "as it is"),
            ("2", f"{layer}self_attn.q_proj.weight", "32 × 32 float32", "as it is"),
            ("2", f"{layer}self_attn.k_proj.weight", "16 × 32 float32", "as it is"),
            ("2", f"{layer}self_attn.v_proj.weight", "16 × 32 float32", "as it is"),
            ("2", f"{layer}self_attn.o_proj.weight", "32 × 32 float32", "as it is"),
            ("2", f"{layer}post_attention_layernorm.weight", "32 float32", "as it is"),
            ("2", f"{layer}block_sparse_moe.gate.weight", "4 × 32 float32", "a new router"),
            ("8", f"{layer}block_sparse_moe.experts.{{0-3}}.w1.weight", "48 × 32 float32", ffn.format("gate")),
            ("8", f"{layer}block_sparse_moe.experts.{{0-3}}.w3.weight", "48 × 32 float32", ffn.format("up")),
            ("8", f"{layer}block_sparse_moe.experts.{{0-3}}.w2.weight", "32 × 48 float32", ffn.format("down")),
        ]
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_name_of_a_tensor_or_a_field_is_broken(width: int, dense_checkpoint: Path, tmp_path: Path) -> None:
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4, experts: {drop: 0.5}}")
    console = Console(width=width, file=io.StringIO())
    for _, table in plan_tables(preparation, tmp_path / "run", width):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    names = {f"model.layers.N.mlp.{name}_proj.weight," for name in ("gate", "up", "down")}
    names |= {f"model.layers.N.block_sparse_moe.experts.{{0-3}}.w{number}.weight" for number in (1, 2, 3)}
    assert names | {"max_position_embeddings", "quantize-float32"} <= words


@pytest.mark.parametrize(
    ("architecture", "upcycle", "expected"),
    [
        (
            "LlamaForCausalLM",
            "{num_experts: 4}",
            {
                "rms_norm_eps": ("1e-06", "carried over"),
                "rope_parameters": ("{'rope_theta': 10000.0, 'rope_type': 'default'}", "carried over"),
                "num_local_experts": ("4", "set"),
                "num_experts_per_tok": ("2", "set"),
                "intermediate_size": ("48", "set"),
                "sliding_window": ("None", "set"),
            },
        ),
        (
            "Qwen3ForCausalLM",
            "{num_experts: 4, layers: [1], experts: {kind: split}}",
            {
                "attention_bias": ("False", "carried over"),
                "head_dim": ("128", "set"),
                "num_local_experts": ("4", "set"),
                "moe_intermediate_size": ("12", "set"),
                "intermediate_size": ("48", "set"),
                "mlp_only_layers": ("[0]", "set"),
                "norm_topk_prob": ("True", "set"),
            },
        ),
    ],
)
def test_the_plan_has_every_value_of_the_config_that_will_be_written(
    architecture: str, upcycle: str, expected: dict[str, tuple[str, str]], make_dense: MakeDense, tmp_path: Path
) -> None:
    preparation = prepared(make_dense(architecture=architecture), tmp_path, upcycle)
    found = {field: (value, origin) for field, value, origin in rendered(plan_tables(preparation, tmp_path, 200)[2][1])}
    assert {field: found[field] for field in expected} == expected
    preparation.plan.target_config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("architectures", "dtype", "model_type", "transformers_version"):
        del written[name]
    assert {name: str(value) for name, value in written.items()} == {name: found[name][0] for name in written}


def test_a_qwen3_with_experts_in_one_layer_shows_which_layers_have_what(make_dense: MakeDense, tmp_path: Path) -> None:
    source = make_dense(architecture="Qwen3ForCausalLM", head_dim=8, num_hidden_layers=3, tie_word_embeddings=False)
    models, tensors, *_ = shown(
        source,
        tmp_path,
        "{num_experts: 4, layers: [1], experts: {kind: granular, granularity: 2, drop: 0.5, noise: 0.1}}",
    )
    assert ("layers, with experts", "3", "1") in models
    assert ("computes what the dense one does", "", "no") in models
    layer, change = "model.layers.N.", ", 0.5 of the neurons drawn anew, noise of 0.1"
    assert {row for row in tensors if "mlp" in row[1] or "lm_head" in row[1]} == {
        ("1", "lm_head.weight", "300 × 32 float32", "as it is"),
        ("2", f"{layer}mlp.gate_proj.weight", "48 × 32 float32", "as it is"),
        ("2", f"{layer}mlp.up_proj.weight", "48 × 32 float32", "as it is"),
        ("2", f"{layer}mlp.down_proj.weight", "32 × 48 float32", "as it is"),
        ("1", f"{layer}mlp.gate.weight", "4 × 32 float32", "a new router"),
        (
            "4",
            f"{layer}mlp.experts.{{0-3}}.gate_proj.weight",
            "24 × 32 float32",
            f"{layer}mlp.gate_proj.weight{change}",
        ),
        ("4", f"{layer}mlp.experts.{{0-3}}.up_proj.weight", "24 × 32 float32", f"{layer}mlp.up_proj.weight{change}"),
        (
            "4",
            f"{layer}mlp.experts.{{0-3}}.down_proj.weight",
            "32 × 24 float32",
            f"{layer}mlp.down_proj.weight{change}, × 2",
        ),
    }
    assert sum(int(number) for number, *_ in tensors) == 3 + 3 * 8 + 2 * 3 + 1 + 3 * 4


def test_what_becomes_one_tensor_and_what_is_folded_is_said(make_dense: MakeDense, tmp_path: Path) -> None:
    _, granite, *_ = shown(
        make_dense(architecture="GraniteForCausalLM"), tmp_path, "{num_experts: 4, shared_expert: zero}"
    )
    layer = "model.layers.N."
    both = f"{layer}mlp.gate_proj.weight and {layer}mlp.up_proj.weight"
    assert ("2", f"{layer}block_sparse_moe.input_linear.weight", "4 × 96 × 32 float32", both) in granite
    assert ("2", f"{layer}shared_mlp.output_linear.weight", "32 × 48 float32", "zeros") in granite
    _, gemma, *_ = shown(make_dense(architecture="GemmaForCausalLM"), tmp_path, "{num_experts: 4}")
    assert (
        "1",
        "model.embed_tokens.weight",
        "300 × 32 float32",
        "model.embed_tokens.weight (MultiplyByRootOfWidth)",
    ) in gemma
    assert ("1", "lm_head.weight", "300 × 32 float32", "model.embed_tokens.weight") in gemma
    assert ("1", "model.norm.weight", "32 float32", "model.norm.weight (AddOne)") in gemma


UNTRAINED = "; a recipe fine-tunes, exports and judges models of the next token or of masked tokens"


def test_t5s_own_numbers_stay_in_its_patterns(make_dense: MakeDense, tmp_path: Path) -> None:
    models, tensors, _, artifacts, _ = shown(
        make_dense(architecture="T5ForConditionalGeneration"),
        tmp_path,
        "{num_experts: 4, num_experts_per_tok: 1, layers: every-2}",
    )
    assert ("layers, with experts", "6", "3") in models
    assert ("computes what the dense one does", "", "with a zero router alone") in models
    wi, block = "encoder.block.N.layer.1.DenseReluDense.wi.weight", "encoder.block.N.layer.1.mlp."
    assert ("8", f"{block}experts.expert_{{0-3}}.wi.weight", "64 × 32 float32", wi) in tensors
    assert ("2", f"{block}wi.weight", "64 × 32 float32", wi) in tensors
    assert (
        "1",
        "encoder.block.N.layer.0.SelfAttention.relative_attention_bias.weight",
        "32 × 4 float32",
        "as it is",
    ) in tensors
    assert artifacts[-1] == (
        "runs up to upcycle",
        "",
        f"SwitchTransformersForConditionalGeneration is no decoder{UNTRAINED}",
    )
    assert not any(label.startswith("onnx") for label, *_ in artifacts)


@pytest.mark.parametrize(
    ("source", "stage", "reason"),
    [
        (
            {"architecture": "Lfm2ForCausalLM", "layer_types": ["conv", "full_attention"]},
            "finetune",
            "export of Lfm2MoeForCausalLM is not supported yet (config.json: model_type lfm2_moe keeps a cache of ",
        ),
        (
            {"is_causal": False},
            "upcycle",
            "MixtralForCausalLM reads in both directions here",
        ),
        (
            {"architecture": "EuroBertForMaskedLM"},
            "upcycle",
            "MixtralForCausalLM reads in both directions here",
        ),
        (
            {"architecture": "LlamaForTokenClassification"},
            "upcycle",
            "MixtralForTokenClassification is no decoder",
        ),
    ],
)
def test_a_recipe_whose_model_no_later_stage_takes_runs_up_to_the_last_that_does(
    source: dict[str, Any], stage: str, reason: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    layers = "last-half" if "layer_types" in source else "all"  # convolutions and experts share no layer
    *_, artifacts, _ = shown(make_dense(**source), tmp_path, f"{{num_experts: 4, layers: {layers}}}")
    last, _, why = artifacts[-1]
    assert last == f"runs up to {stage}"
    assert why.startswith(reason)
    assert not any(label.startswith("onnx") for label, *_ in artifacts)


@pytest.mark.parametrize(
    ("finetune", "results", "mixtures", "dense"),
    [
        ("{}", 1, 9, 0),
        ("{stages: [{train: router}, {train: experts}]}", 2, 9, 0),
        ("{train: router}", 1, 0, 9),  # the control has no routers: all of it learns
        ("{train: router, control: false}", 1, 0, 0),
        ("{train: lora}", 1, 0, 0),
        ("{train: prompt}", 1, 0, 0),
    ],
)
def test_the_disk_that_training_needs_is_every_stages_weights_and_three_checkpoints(
    finetune: str, results: int, mixtures: int, dense: int, dense_checkpoint: Path, tmp_path: Path
) -> None:
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4}", finetune)
    mixture = DENSE + 2 * (3 * EXPERT + ROUTER)
    assert preparation.scratch_bytes.get("finetune") == results * preparation.artifact_bytes["finetune"] + 4 * (
        mixtures * mixture + dense * DENSE
    )


def test_what_a_killed_run_left_is_not_asked_for_again(dense_checkpoint: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4}")
    planned = plan_artifacts(preparation, "report")
    scratch = preparation.scratch_bytes["finetune"]
    left = resume_directory(tmp_path, "finetune", planned[3].key) / "fine-tuned" / "stage-0"
    for size in (None, 1000, 10 * scratch):
        if size is not None:
            left.mkdir(parents=True, exist_ok=True)
            with (left / "model.safetensors").open("wb") as file:
                file.truncate(size)
        asked.append(Walk(preparation, tmp_path, planned, ProgressDisplay(), -1).missing_bytes())
    artifacts = sum(preparation.artifact_bytes.values())
    assert asked == [artifacts + scratch, artifacts + scratch - 1000, artifacts]


def test_artifacts_have_their_sizes_and_add_up(dense_checkpoint: Path, tmp_path: Path) -> None:
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4}")
    title, table = plan_tables(preparation, tmp_path / "run", 200)[3]
    mixture = DENSE + 2 * (3 * EXPERT + ROUTER)
    assert title == f"artifacts in {tmp_path / 'run'}"
    found = {label: (size, note) for label, size, note in rendered(table)}
    assert list(found) == [
        "upcycle",
        "finetune",
        "onnx-float32",
        "quantize-float32",
        "onnx-int8",
        "quantize-int8",
        "disk in all",
        "disk to fine-tune",
    ]
    assert found["upcycle"] == (decimal(4 * mixture), "")
    assert found["finetune"] == (decimal(4 * mixture + 2 * 4 * DENSE), "")
    assert (found["onnx-float32"][1], found["onnx-int8"][1]) == (
        "the fastest lowering of moe, grouped, unrolled",
        "the fastest lowering of qmoe, grouped, unrolled",
    )
    assert found["disk in all"][0] == decimal(sum(preparation.artifact_bytes.values()))
    assert found["disk to fine-tune"] == (
        decimal(4 * mixture + 2 * 4 * DENSE + 9 * 4 * mixture),
        "scratch, deleted when done",
    )


def test_every_stage_of_a_run_has_its_memory_and_the_most_is_said(dense_checkpoint: Path, tmp_path: Path) -> None:
    preparation = prepared(dense_checkpoint, tmp_path, "{num_experts: 4}")
    rows = rendered(plan_tables(preparation, tmp_path / "run", 200)[4][1])
    assert [label for label, _ in rows[:-1]] == [task.label for task in plan_artifacts(preparation, "report")]
    assert rows[-1] == ("most", decimal(max(preparation.memory_bytes.values())))


def test_a_plan_of_fine_tuned_weights_has_the_dtype_that_they_are_written_in(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    source, mixture = make_dense(dtype=torch.bfloat16), DENSE + 2 * (3 * EXPERT + ROUTER)
    sizes = [
        prepared(source, tmp_path, "{num_experts: 4}", f"{{dtype: {dtype}}}").artifact_bytes["finetune"]
        for dtype in ("source", "float32")
    ]
    assert sizes == [2 * mixture + 2 * 2 * DENSE, 4 * mixture + 2 * 4 * DENSE]


def test_what_training_needs_is_sixteen_bytes_of_what_learns_and_the_rest_as_it_is_stored(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    """With a model so large, and text so short, that weights are nearly all of it."""
    source = make_dense(
        dtype=torch.bfloat16, vocab_size=20_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=8
    )
    plans = {}
    for train in ("all", "router", "last-2"):
        preparation = prepared(
            source, tmp_path, "{num_experts: 8, layers: all}", f"{{train: {train}, control: false, batch_size: 1}}"
        )
        plans[train] = preparation.memory_bytes["finetune"]
    total = preparation.plan.num_parameters
    layers = sum(
        math.prod(write.spec.shape)
        for write in preparation.plan.writes
        if ".layers.6." in write.spec.name or ".layers.7." in write.spec.name
    )
    fixed = 520_000_000
    assert plans["all"] == pytest.approx(fixed + 16 * total, rel=0.05)
    assert plans["last-2"] == pytest.approx(fixed + 16 * layers + 2 * (total - layers), rel=0.1)
    assert plans["router"] - fixed < 5 * total
