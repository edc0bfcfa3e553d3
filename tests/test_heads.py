"""Native families with another head: labels of tokens and texts, answers, hidden states; read in either direction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import each_shape

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.table import DENSE_FAMILIES, find_family, list_conversions

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]
PAD = 2
# the FFN's width is one at which torch's SiLU computes strided and contiguous rows alike
FIELDS: dict[str, Any] = {"intermediate_size": 64, "pad_token_id": PAD, "id2label": dict(enumerate("abcde"))}
HEADS = [
    (family.start + head.ends, direction)
    for family in DENSE_FAMILIES
    for head in family.heads
    if head.refusal is None
    for direction in (("both ways",) if family.model_type == "eurobert" else ("forward", "both ways"))
]
# every head once, each direction, and a family whose heads have other names than its targets'
SHAPES = {
    "LlamaModel both ways",
    "MistralForTokenClassification both ways",
    "LlamaForSequenceClassification forward",
    "LlamaForQuestionAnswering forward",
    "EuroBertForTokenClassification both ways",
}


def ignore(*_: Any) -> None:
    """Progress that nobody reads."""


def make(make_dense: MakeDense, architecture: str, direction: str, **fields: Any) -> Path:
    bidirectional = {"is_causal": False} if direction == "both ways" and "EuroBert" not in architecture else {}
    return make_dense(architecture=architecture, **FIELDS, **bidirectional, **fields)


def convert(dense: Path, output: Path, logit_std: float, **settings: Any) -> UpcyclePlan:
    output.mkdir()
    config = UpcycleConfig(num_experts=4, router=RouterConfig(logit_std=logit_std), **settings)
    return upcycle(dense, output, config, 0, ignore)


@torch.no_grad()
def outputs(directory: Path, architecture: str) -> list[torch.Tensor]:
    """What a model gives for two texts, the second of them padded behind; by plain transformers."""
    model, info = getattr(transformers, architecture).from_pretrained(directory, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    ids = torch.randint(PAD + 1, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 15:], mask[1, 15:] = PAD, 0
    given = model.eval()(input_ids=ids, attention_mask=mask)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [given[name] for name in names if given.get(name) is not None]


@pytest.mark.parametrize(("architecture", "direction"), each_shape(HEADS, SHAPES, name=" ".join))
def test_every_target_with_the_head_gives_what_the_dense_model_gives(
    architecture: str, direction: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make(make_dense, architecture, direction)
    expected = outputs(dense, architecture)
    family = find_family(transformers.AutoConfig.from_pretrained(dense).model_type, [architecture], "")
    for row in [row for row in list_conversions(family) if not row.keeps_rest]:
        output = tmp_path / row.target.model_type
        plan = convert(dense, output, 0.0, target=row.target_name)
        assert plan.conversion is row
        check_written(dense, output, plan, 0, ignore)
        found = outputs(output, row.target.architecture)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
        written = transformers.AutoConfig.from_pretrained(output)
        assert (written.id2label, written.num_labels) == (FIELDS["id2label"], 5)
        assert is_causal(written) == (direction == "forward")
        model = getattr(transformers, row.target.architecture)(written)
        model.save_pretrained(tmp_path / "saved")
        with (
            safe_open(output / "model.safetensors", "pt") as ours,
            safe_open(tmp_path / "saved" / "model.safetensors", "pt") as theirs,
        ):
            assert set(ours.keys()) == set(theirs.keys())


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [("MistralForTokenClassification", "whole"), ("LlamaModel", "layers"), ("EuroBertForMaskedLM", "layers")],
)
def test_the_receipt_proves_it(architecture: str, mode: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make(make_dense, architecture, "both ways", num_hidden_layers=2)
    plan = convert(dense, tmp_path / "moe", 1.0, receipt=mode)
    receipt = write_receipt(dense, tmp_path / "moe", plan, 32, ignore)
    texts = {line.text for line in receipt.comparisons}
    last = "head" if architecture == "EuroBertForMaskedLM" else "final norm"
    assert texts == (
        {"one long text", "padded batch"} if mode == "whole" else {"embedding", "layer 0", "layer 1", last}
    )
    zero = [line for line in receipt.comparisons if line.router == "zero"]
    assert zero and all(line.bitwise or line.halves_bitwise for line in zero)


def test_a_receipt_sees_a_direction_that_is_lost(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make(make_dense, "LlamaForCausalLM", "both ways")
    plan = convert(dense, tmp_path / "moe", 0.0)
    config = tmp_path / "moe" / "config.json"
    config.write_text(config.read_text().replace('"is_causal": false', '"is_causal": true'))
    with pytest.raises(UpcycleError, match="one long text: differs from the dense model by"):
        write_receipt(dense, tmp_path / "moe", plan, 32, ignore)


def test_labels_of_texts_without_a_token_for_padding_are_compared_one_by_one(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(architecture="LlamaForSequenceClassification", **FIELDS | {"pad_token_id": None})
    plan = convert(dense, tmp_path / "moe", 0.0)
    receipt = write_receipt(dense, tmp_path / "moe", plan, 32, ignore)
    assert {line.bitwise for line in receipt.comparisons if line.dtype == "float32"} == {True}


@pytest.mark.parametrize("prefix", ["", "model.", "transformer."])
def test_tensors_are_found_under_every_name_that_transformers_loads(
    prefix: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Checkpoints of a base model may have the prefix that a head's would have; those for answers have another."""
    architecture = "LlamaForQuestionAnswering" if prefix == "transformer." else "LlamaModel"
    dense = make(make_dense, architecture, "forward")
    state = load_file(dense / "model.safetensors")
    own = {name: tensor for name, tensor in state.items() if name.startswith("qa_outputs.")}
    base = {prefix + name.removeprefix("transformer."): state[name] for name in state.keys() - own.keys()}
    save_file({**own, **base}, dense / "model.safetensors", metadata={"format": "pt"})
    plan = convert(dense, tmp_path / "moe", 0.0)
    expected = outputs(dense, architecture)
    assert all(map(torch.equal, outputs(tmp_path / "moe", plan.conversion.target.architecture), expected))


def test_labels_of_texts_by_eurobert_have_no_native_target(make_dense: MakeDense, tmp_path: Path) -> None:
    """Its head has two layers and reads all tokens; a mixture of ours keeps it."""
    dense = make(make_dense, "EuroBertForSequenceClassification", "both ways")
    with pytest.raises(UpcycleError, match="EuroBertForSequenceClassification can become mixture"):
        convert(dense, tmp_path / "no", 0.0, target="mixtral")
    assert convert(dense, tmp_path / "moe", 0.0).conversion.keeps_rest
