"""Packages of other makers, of `foreign`, load in our runtime and compute what their twins do.

Every fault can be planted in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from programs import dense2moe
from shapes import each_shape
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.precision import Precision, find_precision
from dense2moe.export.parity.records import ProviderParity, WeightsCheck
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant
from tests.exports import LAYER_PARTS
from tests.faults.planted import FAULTS, Exported, plant
from tests.faults.stores import Inexpressible
from tests.foreign import VARIANTS, Kind, make_checkpoint, make_foreign, quantize_static, write_twin

BLOCKS = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(0))
PREFILL = 36
EXACT = 1e-4  # float32 sums in another order; 3e-6 measured at most
# inputs in 8 bits or all in 16, in the middle of the tokens: routers flip in some of them; .05 measured at most
ROUNDED = 0.15

_COUNTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts"}

pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase
) -> Callable[[Kind], Path]:
    """Where the packages of a kind are made, each export once, of a checkpoint with a tokenizer."""

    @cache
    def make(kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        # exporting takes most of the time, by the layer and by the expert
        few: dict[str, Any] = {"num_hidden_layers": 1} if kind == "llama" else {_COUNTS[kind]: 3}
        make_checkpoint(kind, folder / "source", tokenizer=tiny_tokenizer, **few)
        return folder

    return make


def errors(exported: Exported, reference: Path) -> np.ndarray:
    """By real token, the largest difference of logits relative to the largest.

    Two rows, one padded, in a prefill and then step by step.
    """
    ids, mask = BLOCKS.numpy(), np.ones(BLOCKS.shape, np.int64)
    mask[1, :10] = 0
    decoder = Decoder(exported.package, num_threads=1)
    cache = decoder.new_cache(*ids.shape)
    found = [decoder.run(cache, ids[:, :PREFILL], mask[:, :PREFILL])["logits"]]
    found += [decoder.run(cache, ids[:, n : n + 1])["logits"] for n in range(PREFILL, ids.shape[1])]
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    mask_BT = torch.from_numpy(mask)
    with torch.inference_mode():
        expected = model(
            BLOCKS, attention_mask=mask_BT, position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits.numpy()
    difference = np.abs(np.concatenate(found, axis=1) - expected).max(axis=-1)
    real = mask.astype(bool)
    return difference[real] / np.abs(expected[real]).max()


def floats(package: Path) -> int:
    """Products with float weights."""
    graph = onnx.load(package / MODEL_NAME).graph
    tensors = {tensor.name for tensor in graph.initializer}
    return sum(node.op_type == "MatMul" and node.input[1] in tensors for node in graph.node)


@pytest.mark.parametrize("kind", each_shape(["qwen2_moe", "mixtral"], ["mixtral"]))
def test_a_package_of_another_maker_computes_what_its_twin_does(kind: Kind, folders: Callable[[Kind], Path]) -> None:
    """One export, and then in each variant: float activations to float32 rounding, others but for what they round."""
    for variant in VARIANTS:
        for accuracy in (0, 4) if variant in ("int8", "int4", "mixed") else (0,):
            exported = make_foreign(kind, variant, folders(kind), accuracy=accuracy)
            rounds = accuracy == 4 or variant in ("float16", "int8-qdq")
            assert find_precision(exported.package) == Precision("int4" if variant == "mixed" else variant, rounds)
            error = errors(exported, exported.twin)
            if rounds:
                assert EXACT < np.median(error) < ROUNDED, (variant, accuracy)
            else:
                assert error.max() < EXACT, (variant, accuracy)
            if exported.twin != exported.source:
                assert np.median(errors(exported, exported.source)) > 10 * EXACT, variant
            if variant in ("int8", "int4", "mixed"):
                assert floats(exported.package) == 0, variant  # a router is a Gemm, which the quantizer leaves alone


def test_asymmetric_integers_have_a_twin_too_and_so_has_a_fused_graph(folders: Callable[[Kind], Path]) -> None:
    for variant in ("int8", "int4"):
        exported = make_foreign("llama", variant, folders("llama"), accuracy=0, symmetric=False, fusions="cpu")
        assert errors(exported, exported.twin).max() < EXACT


def test_every_fault_can_be_planted_in_a_package_of_another_maker(
    folders: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """`plant` itself looks where each shows. What is not there is an operator that is told how long rows are."""
    left_out = set()
    for variant in ("float32", "int4"):
        exported = make_foreign("mixtral", variant, folders("mixtral"))
        for number, fault in enumerate(FAULTS.values()):
            folder = tmp_path / f"{variant} {number}"
            folder.mkdir()
            try:
                plant(exported, folder, fault, BLOCKS)
            except Inexpressible:
                left_out.add(fault.words)
    assert left_out == {"KV cache one token short"}


# What parity says of them.

TEXT = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CONFIG = ParityConfig(max_perplexity_increase={}, free_tokens=4, decode_steps=8, longest_row=48, noise_blocks=1)
NAMED = (
    "two experts swapped",
    "one expert's scale wrong by 2 %",
    "0.05 added to a router logit behind its name",
    "rope theta wrong",
    "KV cache off by one",
    "wrong pad side",
)
"""Faults of every tier that names a place; `benchmarks/parity.py --faults` has all of them."""


def judge(exported: Exported, blocks: torch.Tensor = TEXT) -> tuple[tuple[str, ...], ProviderParity]:
    precision = find_precision(exported.package)
    parity = check_parity(
        ParitySubject(
            exported.package, exported.twin, exported.source, blocks, precision.variant, precision.rounds_activations
        ),
        CONFIG,
        lambda *_: None,
    )
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return parity.breaches, result


@pytest.mark.parametrize("variant", ["float32", "int8", "int8-qdq", "int4", "mixed"])
def test_places_are_found_by_their_weights_and_all_are_right(folders: Callable[[Kind], Path], variant: Variant) -> None:
    """With activations in 8 bits too: the twin rounds as the operators do, and only the order of sums is left."""
    breaches, result = judge(make_foreign("mixtral", variant, folders("mixtral")))
    assert breaches == ()
    untold = {"task": "not run: no task was given", "routing": "not run: the package shows no router logits"}
    assert {tier: told for tier, told in result.tiers.items() if told != "passed"} == untold
    assert isinstance(result.places, tuple)
    layers = [(n, part) for n in (0, 1) for part in LAYER_PARTS]
    assert [(place.layer, place.part) for place in result.places] == [
        (-1, "embedding"),
        *layers,
        (-1, "final norm"),
        (-1, "head"),
    ]
    assert max(place.error for place in result.places) < 1e-5
    assert not isinstance(result.weights, str)
    assert result.weights.not_judged == ()


def test_a_graph_that_rounds_more_than_products_by_weights_is_judged_by_itself(
    folders: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """Attention in 8 bits, and unsigned integers: the twin has no such rounding, and calls nothing of it wrong."""
    right = make_foreign("mixtral", "int8-qdq", folders("mixtral"))
    float32 = make_foreign("mixtral", "float32", folders("mixtral"))
    package = quantize_static(float32.package, tmp_path / "package", symmetric=False, products=True)
    breaches, result = judge(Exported(right.source, write_twin(right.source, package, tmp_path / "twin"), package))
    assert breaches == ()
    assert isinstance(result.weights, WeightsCheck)
    assert result.weights.num_wrong == 0
    why = "not judged: the twin cannot round as the graph does: '"
    assert all(result.tiers[tier].startswith(why) for tier in ("operator", "layer"))
    assert {"logits", "kl", "routing", "factor"} & set(result.limits) == {"logits"}


def test_a_package_of_transformers_exporter_is_its_checkpoint(folders: Callable[[Kind], Path]) -> None:
    """The command finds it so; whoever exports a package gives past and present our names."""
    exported = make_foreign("mixtral", "float32", folders("mixtral"))
    text = ("--data", Path(__file__).parent.parent / "LICENSE", "--blocks", 4, "--block-size", 48)
    result = dense2moe("parity", exported.package, "--reference", exported.source, *text)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("parity passed\n")


def test_faults_in_a_package_of_another_maker_are_named(folders: Callable[[Kind], Path], tmp_path: Path) -> None:
    exported = make_foreign("mixtral", "int4", folders("mixtral"))
    for words in NAMED:
        folder = tmp_path / words.replace("%", "")
        folder.mkdir()
        breaches, _ = judge(plant(exported, folder, FAULTS[words], TEXT))
        assert breaches
        assert FAULTS[words].is_named(breaches[0]), (words, breaches[0])


def test_angles_that_are_multiplied_in_16_bits_are_told(folders: Callable[[Kind], Path]) -> None:
    """Which onnxruntime's converter does: the longer a row, the less is right of its positions."""
    text = torch.randint(2, 300, (2, 160), generator=torch.Generator().manual_seed(0))
    breaches, result = judge(make_foreign("llama", "float16", folders("llama"), fusions="cpu"), text)
    assert isinstance(result.places, tuple)
    assert {place.part for place in result.places if not place.is_right} <= {"cache", "attention"}
    assert all(
        "look at positions and rotary tables" in breach
        for breach in breaches
        if ": layer: " in breach and "cached" in breach
    )
    assert any("the cached keys and values" in breach for breach in breaches)
