"""8-bit activations.

Rounded in torch as by onnxruntime, costing less where inputs are scaled, and parity's limits under them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import open_reference
from dense2moe.export.parity.inside.arithmetic import find_arithmetic
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.records import Limit
from dense2moe.export.parity.rounding import Rounding, RoundingMeasure, rounding_limits
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.taps import Seen
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import check_weights
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.input_scaling import round_inputs
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.simulation import BlockRounding
from dense2moe.export.runtime.decoder import CPU, Decoder
from tests.test_calibration import draw_blocks, load
from tests.test_input_scaling import plant


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_simulation_rounds_as_the_operator_does(bits: int, block_size: int) -> None:
    """The node is made by onnx's own helper, and its product of known integers taken in float64."""
    width, rows, draw = 256, 48, np.random.default_rng(0)
    codes = draw.integers(0, 1 << bits, (rows, width)).astype(np.uint8)
    scales = draw.uniform(0.001, 0.01, (rows, width // block_size)).astype(np.float32)
    packed = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
    x = (draw.standard_normal((5, width)) * np.exp(draw.standard_normal(width))).astype(np.float32)
    sizes = {"K": width, "N": rows, "bits": bits, "block_size": block_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    weights = [
        numpy_helper.from_array(packed.reshape(rows, width // block_size, -1), "codes"),
        numpy_helper.from_array(scales.ravel(), "scales"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "product", values[:1], values[1:], weights), opset_imports=opsets, ir_version=10
    )
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    weight = (codes - float(1 << (bits - 1))) * np.repeat(scales, block_size, 1)
    expected = round_inputs(torch.from_numpy(x), block_size).double().numpy() @ weight.T
    exact = x.astype(np.float64) @ weight.T
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.abs(found - exact).max() > 1e-3 * np.abs(expected).max(), "the operator does round"


def test_rounding_pads_a_width_that_the_block_does_not_divide() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_inputs(x, 32)[:, 32:], round_inputs(x[:, 32:], 8))


def make_package(mixture: Path, directory: Path, **fields: object) -> tuple[Path, Path]:
    twin, package = directory / "twin", directory / "package"
    for path in (twin, package):
        path.mkdir(parents=True)
    config = QuantizeConfig.model_validate({"block_size": 16, "method": "search", **fields})
    quantize_checkpoint(mixture, twin, "int8", config, lambda *_: None, QuantizeInputs(blocks=draw_blocks(32)))
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *_: None)
    return twin, package


def run(package: Path, ids: torch.Tensor) -> torch.Tensor:
    decoder = Decoder(package)
    return torch.from_numpy(np.array(decoder.run(decoder.new_cache(*ids.shape), ids.numpy())["logits"]))


def test_outliers_cost_a_rounded_graph_less_where_inputs_are_scaled(mixture_checkpoint: Path, tmp_path: Path) -> None:
    mixture, ids = plant(mixture_checkpoint, tmp_path / "mixture"), draw_blocks(8, seed=1)
    with torch.no_grad():
        expected = load(mixture)(ids).logits
    errors = {}
    for scaling in ("none", "auto"):
        _, package = make_package(mixture, tmp_path / scaling, input_scaling=scaling)
        errors[scaling] = float((run(package, ids) - expected).square().mean())
    assert errors["auto"] < 0.6 * errors["none"]


def test_a_tied_head_keeps_its_function_and_the_embedding_its_rows(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """The checkpoint's head is its embedding.

    With exact activations the graph must compute what plain transformers does with the twin.
    """
    mixture = plant(mixture_checkpoint, tmp_path / "mixture", norms=("norm.weight",))
    twin, package = tmp_path / "twin", tmp_path / "package"
    for path in (twin, package):
        path.mkdir()
    quantize_checkpoint(
        mixture, twin, "int8", QuantizeConfig(block_size=16), lambda *_: None, QuantizeInputs(blocks=draw_blocks(64))
    )
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=32), lambda *_: None)
    factors = {
        tensor.name for tensor in onnx.load(package / "model.onnx", load_external_data=False).graph.initializer
    } & {
        "embedding.factors",
        "logits.input_factors",
    }
    assert len(factors) == 2
    ids = draw_blocks(4, seed=1)
    with torch.no_grad():
        expected = load(twin)(ids).logits
    assert float((run(package, ids) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_parity_holds_kl_to_what_two_rounded_computations_part_by(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """And no rounding of one graph is a breach of another, even where the settings leave no room at all."""
    mixture, blocks = plant(mixture_checkpoint, tmp_path / "mixture"), draw_blocks(8, seed=1)
    twin, package = make_package(mixture, tmp_path, input_scaling="none")
    config = ParityConfig(max_kl=1e-9, max_perplexity_increase={}, min_routing_agreement=1.0)
    found = check_parity(ParitySubject(package, twin, mixture, blocks, "int8", True), config, lambda *_: None)
    result = found.providers["CPUExecutionProvider"]
    assert not isinstance(result, str)
    assert found.passed, found.breaches
    for name in ("kl", "routing", "logits", "factor"):
        assert "the difference between two equally rounded computations of the twin" in result.limits[name].origin
    assert 1e-6 < result.limits["kl"].value < 1e-2
    assert result.twin.kl < result.limits["kl"].value / 3, "the twin rounds as the graph does"
    assert isinstance(result.places, tuple)
    assert max(check.error for check in result.places) < 1e-5, "and so does each place of it, scaled inputs or not"


def test_what_two_computations_part_by_is_measured_on_enough_text(mixture_checkpoint: Path) -> None:
    """The second one here has logits that are 1 % larger and nothing else."""
    ids = draw_blocks(16, seed=1)
    with open_reference(mixture_checkpoint) as reference:
        head = reference.model.get_output_embeddings()

        @contextmanager
        def moved() -> Iterator[None]:
            handle = head.register_forward_hook(lambda _module, _given, output: 1.01 * output)
            yield
            handle.remove()

        measure, parts = RoundingMeasure(reference, moved, lambda twin, seen: twin.forward(seen.ids, seen.mask)), []
        for batch in ids.split(4):
            mask = torch.ones_like(batch)
            expected = reference.forward(batch, mask)
            measure.add(batch, expected, Seen(batch, mask, batch.shape[1], expected.logits, {}))
            parts.append(expected.logits)
        found = measure.result()
    logits = torch.cat(parts).flatten(0, 1)[: found.num_tokens].double()
    log_p, log_q = logits.log_softmax(-1), (1.01 * logits).log_softmax(-1)
    assert 256 <= found.num_tokens < 256 + ids.shape[1]
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert found.factor == pytest.approx(0.01, rel=1e-4)
    assert found.logits == pytest.approx(0.01, rel=1e-4)
    assert found.routing == 1.0


def test_limits_are_never_narrower_than_the_settings() -> None:
    settings = {"kl": Limit(1e-3, "parity.max_kl"), "routing": Limit(0.97, "parity.min_routing_agreement")}
    narrow = rounding_limits(settings, Rounding(1e-4, 0.999, 0.01, 1e-3, 1e-4, 512))
    assert {name: narrow[name] for name in settings} == settings
    wider = rounding_limits(settings, Rounding(2e-3, 0.96, 0.01, 1e-3, 1e-4, 512))
    assert {name: round(limit.value, 9) for name, limit in wider.items()} == {
        "kl": 6e-3,
        "routing": 0.88,
        "logits": 0.04,
        "factor": 8e-3,
    }
    exact = rounding_limits(settings, Rounding(0.0, 1.0, 0.0, 0.0, 1e-4, 512))
    assert exact["factor"].value == pytest.approx(8 * 2e-5), "sums in another order make logits larger by as much"


@pytest.mark.parametrize("bits", [8, 32])
def test_the_arithmetic_of_a_graph_is_read_from_it(mixture_checkpoint: Path, tmp_path: Path, bits: int) -> None:
    twin, package = tmp_path / "twin", tmp_path / "package"
    for path in (twin, package):
        path.mkdir()
    quantize_checkpoint(
        mixture_checkpoint, twin, "int4", QuantizeConfig(block_size=16, method="round"), lambda *_: None
    )
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=bits), lambda *_: None)
    found = find_arithmetic(package, check_weights(read_constants(package), twin), CPU)
    assert (found.narrow, found.unknown) == (None, ())
    # the head is the embedding
    quantized = {name for name in load(twin).state_dict() if "proj" in name or "experts" in name or "embed" in name}
    stacked = {name for name in found.rounds if ".experts." in name}
    assert (len(found.rounds) > 0) == (bits == 8)
    assert {name for name in quantized if "experts" not in name} == found.rounds.keys() - stacked or bits == 32
    assert all(isinstance(rounding, BlockRounding) and rounding.block_size == 16 for rounding in found.rounds.values())
