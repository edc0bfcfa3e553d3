"""The receipt finds a fault in any layer, and in what a checkpoint holds besides, part by part."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from receipts import (
    DECODERS,
    EXACT,
    LEFT_OVER,
    MISSING,
    NUMBER,
    WINDOW,
    MakeDense,
    made_once,
    make_gates_overflow,
    make_mixture,
    read_in,
    receipt,
    refusal,
    rewrite,
)
from safetensors.torch import load_file
from shapes import each_shape
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT
from dense2moe.upcycle.checkpoints.loaded import load_model

# Layer by layer


# One of each way in which a layer is built: plain, with a window in all of them or in some and a fused or biased
# attention, with experts in some layers, folded norms, norms behind, multipliers, a shared expert, a selection bias,
# rotary bases by layer, convolutions.
SHAPES = {
    "llama to mixtral",
    "llama to granitemoeshared",
    "phi3",
    "gemma",
    "qwen2",
    "qwen3",
    "olmo2",
    "granite",
    "llama to glm4_moe",
    "granite swa",
    "lfm2",
}


@pytest.mark.parametrize("name", each_shape(DECODERS, SHAPES))
def test_every_decoder_family_passes_layer_by_layer(name: str, make_dense: MakeDense) -> None:
    found = made_once(make_dense, name, receipt="layers").receipt
    assert found.mode == "layers"
    assert "compared layer by layer: decoding with a cache and float16 were not run" in found.notes
    layers = [
        (f"layer {n}", experts, router)
        for n in range(2)
        for experts in ("eager", "grouped_mm")
        for router in ("shipped", "zero")
    ]
    assert [(c.dtype, c.text, c.experts, c.router) for c in found.comparisons] == [
        (dtype, *line)
        for dtype in ("float32", "bfloat16")
        for line in (("embedding", "no", "no"), *layers, ("head", "no", "no"))
    ]
    for c in found.comparisons:
        assert c.num_tokens == 80 > WINDOW
        assert c.limit == (ROUNDING_LIMIT if c.dtype == "float32" else None)
        assert c.rel <= (ROUNDING_LIMIT if c.dtype == "float32" else 0.1)
        assert c.bitwise or not c.bitwise_due
        inexact = ("gemma",) if c.router == "no" else ("gemma", "llama to granitemoeshared", "lfm2")
        assert c.bitwise_due == (c.router != "shipped" and name not in inexact)


# Whole models are built by transformers; what differs is whether bits must be equal, and which layers have experts.
@pytest.mark.parametrize(
    "name", each_shape(DECODERS, {"llama to mixtral", "gemma", "llama to granitemoeshared", "llama to glm4_moe"})
)
def test_every_decoder_family_passes_as_a_whole(name: str, make_dense: MakeDense) -> None:
    found = made_once(make_dense, name, receipt="whole").receipt
    assert found.mode == "whole"
    assert len(found.comparisons) == 28


FAULTS = {
    "an expert": lambda state: [
        weight.mul_(1.01) for name, weight in state.items() if "layers.1." in name and "experts" in name
    ],
    # not all rows: a norm after it would undo that
    "attention": lambda state: state["model.layers.1.self_attn.o_proj.weight"][:16].mul_(1.01),
    "a norm": lambda state: state["model.layers.1.post_attention_layernorm.weight"].mul_(1.01),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["llama to mixtral", "gemma", "qwen3", "olmo2"])
def test_a_fault_in_one_layer_is_named_by_that_layer(
    name: str, fault: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in("float32", monkeypatch)
    made = made_once(make_dense, name, dense={"num_hidden_layers": 3}, receipt="layers")
    assert made.float32_receipt
    mixture = made.copy(tmp_path)
    rewrite(mixture, FAULTS[fault])
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, float32, eager experts, layer 1: differs from the dense model by ")
        + NUMBER
        + re.escape("; at most 1e-05"),
        refusal(made.dense, mixture, made.plan),
    )


@pytest.mark.parametrize(
    ("name", "tied", "tensor", "part"),
    [
        ("llama to mixtral", True, "model.embed_tokens.weight", "embedding"),
        ("llama to mixtral", True, "model.norm.weight", "head"),
        ("olmo2", False, "model.embed_tokens.weight", "embedding"),
        ("olmo2", False, "lm_head.weight", "head"),
        ("gemma", True, "model.embed_tokens.weight", "embedding"),
        ("gemma", True, "model.norm.weight", "head"),
        ("gemma", True, "lm_head.weight", "head"),
    ],
)
def test_what_is_outside_the_layers_and_altered_on_disk_is_refused_layer_by_layer(
    name: str, tied: bool, tensor: str, part: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Whatever became of the experts."""
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, tie_word_embeddings=tied, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers", noise=0.5, **overrides)
    # of the embedding, rows of letters, which any text has
    rewrite(mixture, lambda state: state[tensor][:24].mul_(1.01))
    due = "at most 1e-05" if name == "gemma" else "it must be bitwise equal"
    where = re.escape(f"{mixture}: no router, float32, no experts, {part}: differs from the dense model by ")
    assert re.fullmatch(f"{where}{NUMBER}; {due}", refusal(dense, mixture, plan))


@pytest.mark.parametrize(("field", "part"), [("embedding_multiplier", "embedding"), ("logits_scaling", "head")])
@pytest.mark.parametrize("name", ["granite", "llama to granitemoeshared"])
def test_a_multiplier_outside_the_layers_that_is_wrong_is_refused_layer_by_layer(
    name: str, field: str, part: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    made = made_once(make_dense, name, receipt="layers")
    mixture = made.copy(tmp_path)
    values = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps(values | {field: 1.001 * values[field]}))
    assert f"no router, float32, no experts, {part}: differs from the dense model by " in refusal(
        made.dense, mixture, made.plan
    )


def test_a_head_that_is_tied_on_one_side_alone_is_refused_layer_by_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT, tie_word_embeddings=False), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers")
    path = mixture / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    receipt(dense, mixture, plan)  # transformers ties no head that is stored and different
    rewrite(mixture, lambda state: state.pop("lm_head.weight"))
    assert "float32, no experts, head: differs from the dense model by " in refusal(dense, mixture, plan)


# What a checkpoint holds besides


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def store_another_head(directory: Path) -> None:
    rewrite(directory, lambda state: state.update({HEAD: state[EMBEDDING].flip(0).contiguous()}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "mode"),
    each_shape(
        [(name, mode) for name in DECODERS if name != "gemma" for mode in ("whole", "layers")],
        # as a whole once; layer by layer with a head that is scaled, a final norm of another name, and plain
        {"llama to mixtral, whole", "llama to mixtral, layers", "granite, layers", "lfm2, layers"},
        name=", ".join,
    ),
)
def test_a_head_that_config_json_ties_and_transformers_does_not_is_kept(
    name: str, mode: Any, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in("float32", monkeypatch)
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    store_another_head(dense)
    plan = make_mixture(dense, mixture, receipt=mode, **overrides)
    receipt(dense, mixture, plan)
    assert plan.dropped == ()
    assert json.loads((mixture / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(mixture / "model.safetensors")[HEAD], load_file(dense / "model.safetensors")[HEAD])
    ids = torch.arange(2, 42)[None]
    expected, found = (
        load(path)(ids).logits
        for load, path in ((AutoModelForCausalLM.from_pretrained, dense), (load_as_float32, mixture))
    )
    # by the tied head it is more than 1
    assert float((found - expected).abs().max() / expected.abs().max()) <= ROUNDING_LIMIT


def load_as_float32(directory: Path) -> Any:
    return load_model(directory, torch.float32)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_copy_of_the_embedding_stored_as_its_head_is_dropped(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    plan = make_mixture(dense, mixture, receipt=mode)
    receipt(dense, mixture, plan)
    assert plan.dropped == (HEAD,)
    assert json.loads((mixture / "config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in load_file(mixture / "model.safetensors")


@pytest.mark.parametrize(("mode", "part"), [("whole", "eager experts, one long text"), ("layers", "no experts, head")])
def test_a_conversion_that_drops_the_head_is_found_by_the_receipt_itself(
    mode: Any, part: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rule that should have kept it switched off."""
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    store_another_head(dense)
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.reader._are_equal", lambda *_: True)
    plan = make_mixture(dense, mixture, receipt=mode)
    assert plan.dropped == (HEAD,)
    assert f"float32, {part}: differs from the dense model by" in refusal(dense, mixture, plan)


OUTSIDE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a tensor too many": (
        lambda state: state.update({"model.extra": torch.ones(3)}),
        LEFT_OVER.format("tensor 'model.extra'"),
    ),
    "a layer too many": (
        lambda state: state.update({"model.layers.2.x": torch.ones(3)}),
        LEFT_OVER.format("tensor 'model.layers.2.x'"),
    ),
    "no norm": (lambda state: state.pop("model.norm.weight"), MISSING.format("tensor 'model.norm.weight'")),
    "no head": (lambda state: state.pop(HEAD), MISSING.format(f"tensor '{HEAD}'")),
    "no embedding": (lambda state: state.pop(EMBEDDING), MISSING.format(f"tensor '{EMBEDDING}'")),
    "a wider head": (
        lambda state: state.update({HEAD: torch.ones(301, 32)}),
        f"tensor '{HEAD}' of shape [301, 32]; by config.json it must be [300, 32]; correct one of the two",
    ),
}


@pytest.mark.parametrize("side", ["dense", "mixture"])
@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("fault", OUTSIDE)
def test_what_is_missing_or_left_over_on_either_side_is_refused(
    fault: str, mode: Any, side: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    change, reason = OUTSIDE[fault]
    made = made_once(make_dense, dense={"tie_word_embeddings": False}, receipt=mode)
    dense, mixture = Path(shutil.copytree(made.dense, tmp_path / "dense")), made.copy(tmp_path)
    changed = dense if side == "dense" else mixture
    rewrite(changed, change)
    assert refusal(dense, mixture, made.plan) == f"{changed}: {reason}"


def enlarge(size: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Half of the elements of every state are large, and norms hide them from attention and FFN.

    The outliers that large models have, only more.
    """

    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.embed_tokens.weight"][:, 16:] = size
        for name, tensor in state.items():
            if "layernorm" in name:
                tensor.mul_(size)  # which is about what the norm divides by
                tensor[16:] = 0.0

    return change


def test_a_large_residual_stream_hides_no_fault_of_an_ffn_and_is_none(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT, num_hidden_layers=6), tmp_path / "mixture"
    rewrite(dense, make_gates_overflow(1000.0))
    plan = make_mixture(dense, mixture, k=3, receipt="layers")
    receipt(dense, mixture, plan)  # the last bit of 1000 is 4e-5 of what a layer adds
    rewrite(
        mixture,
        lambda state: [
            weight.mul_(1.0001) for name, weight in state.items() if "layers.1." in name and "experts" in name
        ],
    )
    message = refusal(dense, mixture, plan)
    assert "layer 1: differs from the dense model by" in message
    difference = re.search(NUMBER, message)
    assert difference is not None
    assert float(difference[0]) > 5e-5  # of the stream, it would be a thousandth of that


def test_a_layer_that_adds_nothing_is_compared_too(make_dense: MakeDense, tmp_path: Path) -> None:
    def silence(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if "o_proj" in name or "down_proj" in name:
                tensor.zero_()

    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, silence)
    plan = make_mixture(dense, mixture, receipt="layers")
    assert {c.rel for c in receipt(dense, mixture, plan).comparisons} == {0.0}
    rewrite(mixture, lambda state: state["model.layers.1.self_attn.o_proj.weight"].fill_(1e-3))
    assert "layer 1: differs from the dense model by" in refusal(dense, mixture, plan)


def test_a_config_that_lost_a_window_is_found_layer_by_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    made = made_once(make_dense, "mistral", receipt="layers")
    mixture = made.copy(tmp_path)
    path = mixture / "config.json"
    assert '"sliding_window": 12' in path.read_text()
    path.write_text(path.read_text().replace('"sliding_window": 12', '"sliding_window": null'))
    assert "layer 0: differs from the dense model by" in refusal(made.dense, mixture, made.plan)
