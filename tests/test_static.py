"""Static 8-bit quantization: ranges, scales, and a graph that computes what torch does with rounded activations."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeForCausalLM,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from dense2moe.export.errors import ExportError
from dense2moe.export.footprint import estimate_bytes
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.simulation import RoundedInputs
from dense2moe.export.quantization.static import Magnitudes
from dense2moe.export.quantization.twin import SCHEME_NAME, QuantizedWeight, Twin
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.storage import DATA_NAME, MODEL_NAME
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
BLOCKS = torch.randint(2, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0))


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(directory: Path, model_class: Any = MixtralForCausalLM, **fields: Any) -> Path:
    """Random, with every expert chosen unless asked otherwise, so that no rounding changes which."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**SMALL | {"tie_word_embeddings": True} | fields))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def make_twin(source: Path, directory: Path, **config: Any) -> Path:
    directory.mkdir()
    quantize_checkpoint(source, directory, "int8-qdq", QuantizeConfig(**config), silent, QuantizeInputs(blocks=BLOCKS))
    return directory


def make_package(twin: Path, directory: Path, **config: Any) -> Path:
    directory.mkdir()
    write_package(twin, directory, OnnxConfig(**{"lowering": "grouped"} | config), silent)
    return directory


def load(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@contextmanager
def rounded_inputs(model: PreTrainedModel, scales: dict[int, float]) -> Iterator[Counter[int]]:
    """Every product of torch by a weight whose address has a scale reads its input through torch's own fake.

    Quantization; how often each was used.
    """
    used: Counter[int] = Counter()
    plain = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scale = scales.get(weight.data_ptr())
        if scale is not None:
            used[weight.data_ptr()] += 1
            x = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
        return plain(x, weight, bias)

    with patch.object(torch.nn.functional, "linear", linear):
        yield used


def address_scales(model: Any, scheme: dict[str, Any]) -> dict[int, float]:
    """The scheme's scales by the addresses of transformers' weights, for the names of Mixtral."""
    scales = scheme["input_scales"]
    found = {}
    for n, layer in enumerate(model.model.layers):
        for part in ("q", "k", "v", "o"):
            found[getattr(layer.self_attn, f"{part}_proj").weight.data_ptr()] = scales[
                f"model.layers.{n}.self_attn.{part}_proj.weight"
            ][0]
        for e in range(SMALL["num_local_experts"]):
            name = f"model.layers.{n}.block_sparse_moe.experts.{e}"
            assert scales[f"{name}.w1.weight"] == scales[f"{name}.w3.weight"]
            found[layer.mlp.experts.gate_up_proj[e].data_ptr()] = scales[f"{name}.w1.weight"][0]
            found[layer.mlp.experts.down_proj[e].data_ptr()] = scales[f"{name}.w2.weight"][0]
    (head,) = scales["model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"]
    return found | {model.lm_head.weight.data_ptr(): head}


def run(
    package: Path, ids: torch.Tensor, level: ort.GraphOptimizationLevel | None = None, optimized: Path | None = None
) -> np.ndarray:
    """Logits of one prefill, by the runtime of ours or, with a level of graph optimizations, by a plain session."""
    if level is None:
        decoder = Decoder(package, num_threads=1)
        return decoder.run(decoder.new_cache(*ids.shape), ids.numpy())["logits"]
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = level, 3, 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(package / MODEL_NAME, options, providers=["CPUExecutionProvider"])
    empty = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()[2:]
    }
    found: np.ndarray = session.run(
        ["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64), **empty}
    )[0]
    return found


def difference(found: np.ndarray, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


# A value half way between two integers may be rounded to either, by an order of sums: a step of 1/127 in one of 40
# inputs or so. 4e-3 measured.
ONE_STEP = 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lowering", ["grouped", "unrolled"])
def test_the_graph_computes_what_torch_does_with_rounded_inputs(tmp_path: Path, lowering: str, tied: bool) -> None:
    twin = make_twin(make_mixture(tmp_path / "source", tie_word_embeddings=tied), tmp_path / "twin")
    package = make_package(twin, tmp_path / "package", lowering=lowering)
    model, scheme, ids = load(twin), json.loads((twin / SCHEME_NAME).read_text()), BLOCKS[:3]
    scales = address_scales(model, scheme)
    with torch.inference_mode():
        plain = model(ids).logits
        with rounded_inputs(model, scales) as used:
            expected = model(ids).logits
    assert set(used) == set(scales)
    assert len(scales) == 2 * (4 + 2 * 3) + 1
    found = [
        run(package, ids),
        *(
            run(package, ids, level)
            for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
        ),
    ]
    rounding = difference(plain.numpy(), expected)
    for logits in found:
        assert difference(logits, expected) < min(ONE_STEP, rounding / 2)


def test_without_vnni_products_are_exact_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our runtime then asks onnxruntime for its other kernel, which turns weights unsigned; here both are exact."""
    package = make_package(make_twin(make_mixture(tmp_path / "source"), tmp_path / "twin"), tmp_path / "package")
    found, really = [], torch.cpu._is_vnni_supported()
    for has_vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has_vnni=has_vnni: has_vnni)
        found.append(run(package, BLOCKS[:3]))
    exact = run(package, BLOCKS[:3], ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert difference(found[1], torch.from_numpy(exact)) < ONE_STEP
    if really:
        assert difference(found[0], torch.from_numpy(exact)) < ONE_STEP


def test_onnxruntime_computes_every_product_but_the_routers_in_integers(tmp_path: Path) -> None:
    package = make_package(make_twin(make_mixture(tmp_path / "source"), tmp_path / "twin"), tmp_path / "package")
    run(package, BLOCKS[:1], ort.GraphOptimizationLevel.ORT_ENABLE_ALL, tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    # attention's two, two an expert, and the head
    assert operators["MatMulIntegerToFloat"] == 2 * (2 + 2 * SMALL["num_local_experts"]) + 1
    assert operators["DequantizeLinear"] == 0
    assert operators["MatMul"] == 2 * 2  # the router, and the sum of experts by their weights
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert [kinds[f"router_logits.{n}.weight"] for n in range(2)] == [onnx.TensorProto.FLOAT] * 2


def test_weights_have_a_positive_scale_a_row_and_integers_that_are_symmetric(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name][3] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    twin = make_twin(source, tmp_path / "twin")
    weight, found = tensors[name].double().numpy(), Twin(twin).weight(name)
    assert isinstance(found, QuantizedWeight)
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127
    scales[3] = 1
    integers = np.rint(weight / scales)
    np.testing.assert_allclose(found.read().scales.numpy(), scales, rtol=1e-6)
    np.testing.assert_array_equal(found.read().codes[:, 0].numpy().astype(int) - 128, integers)
    np.testing.assert_allclose(load_file(twin / "model.safetensors")[name], integers * scales, rtol=1e-6)
    package = make_package(twin, tmp_path / "package")
    proto = onnx.load(package / MODEL_NAME)
    (held,) = (tensor for tensor in proto.graph.initializer if tensor.name == "layers.1.moe.expert.2.gate_up.codes")
    assert held.data_type == onnx.TensorProto.INT8
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(held)[:, : len(weight)].T, integers)


def hooked_magnitudes(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """The largest magnitudes that the products of the first layer read, and the head.

    By hooks on transformers' modules.
    """
    found: dict[str, float] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs: found.update({name: float(inputs[0].abs().max())})

    layer = model.model.layers[0]
    for name, module in (
        ("q", layer.self_attn.q_proj),
        ("o", layer.self_attn.o_proj),
        ("experts", layer.mlp),
        ("head", model.lm_head),
    ):
        module.register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        model(ids)
    return found


def test_ranges_are_those_of_what_transformers_modules_read(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    twin = make_twin(source, tmp_path / "twin", activation_range="largest")
    scales = json.loads((twin / SCHEME_NAME).read_text())["input_scales"]
    expected, last = hooked_magnitudes(load(source), BLOCKS), hooked_magnitudes(load(twin), BLOCKS)["head"]
    attention, experts = (
        "model.layers.0.self_attn.{}_proj.weight",
        "model.layers.0.block_sparse_moe.experts.{}.w{}.weight",
    )
    for part, name in (("q", "q"), ("k", "q"), ("v", "q"), ("o", "o")):
        assert scales[attention.format(part)] == [pytest.approx(expected[name] / 127, rel=1e-5)]
    for e in range(3):
        assert (
            scales[experts.format(e, 1)]
            == scales[experts.format(e, 3)]
            == [pytest.approx(expected["experts"] / 127, rel=1e-5)]
        )
    assert len({scales[experts.format(e, 2)][0] for e in range(3)}) == 3
    # calibration reads the embedding as it was, the twin reads it rounded
    assert scales["model.embed_tokens.weight"] == [pytest.approx(last / 127, rel=0.02)]
    assert len(scales) == 2 * (4 + 3 * 3) + 1


def test_an_expert_that_sees_no_token_has_the_widest_range_of_its_layer(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source", num_experts_per_tok=1)
    tensors = load_file(source / "model.safetensors")
    for n in range(2):
        router = tensors[f"model.layers.{n}.block_sparse_moe.gate.weight"]
        router[1], router[2] = -router[0], 0  # of a logit, its negative and zero, zero is never the largest
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    twin = make_twin(source, tmp_path / "twin")
    scheme = json.loads((twin / SCHEME_NAME).read_text())
    assert scheme["fewest_expert_tokens"] == 0
    for n in range(2):
        scales = [
            scheme["input_scales"][f"model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight"][0] for e in range(3)
        ]
        assert scales[2] == max(scales[:2])
        assert scheme["expert_tokens"][str(n)][2] == 0
    assert np.isfinite(run(make_package(twin, tmp_path / "package"), BLOCKS[:1])).all()
    seen = make_twin(source, tmp_path / "all", calibrate_all_experts=True)
    assert json.loads((seen / SCHEME_NAME).read_text())["fewest_expert_tokens"] == BLOCKS.numel()


def test_experts_that_are_stacked_in_one_tensor_have_ranges_of_their_own(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source", GraniteMoeForCausalLM)
    twin = make_twin(source, tmp_path / "twin")
    scheme = json.loads((twin / SCHEME_NAME).read_text())
    names = [name for name in scheme["input_scales"] if "block_sparse_moe" in name]
    assert sorted(len(scheme["input_scales"][name]) for name in names) == [1, 1, 3, 3]
    package = make_package(twin, tmp_path / "package")
    held = {tensor.name: tensor for tensor in onnx.load(package / MODEL_NAME).graph.initializer}
    down = scheme["input_scales"]["model.layers.1.block_sparse_moe.output_linear.weight"]
    for e, scale in enumerate(down):
        assert onnx.numpy_helper.to_array(held[f"layers.1.moe.expert.{e}.down.input_scale"]) == np.float32(scale)
    model, ids = load(twin), BLOCKS[:3]
    rounding = RoundedInputs(model, Twin(twin))
    assert len(rounding.rounds) == 2 * (4 + 2 * 3) + 1
    with torch.inference_mode(), rounding:
        expected = model(ids).logits
    assert difference(run(package, ids), expected) < ONE_STEP


@pytest.mark.parametrize("tied", [True, False])
def test_the_simulation_is_torch_s_own_fake_quantization(tmp_path: Path, tied: bool) -> None:
    twin = make_twin(make_mixture(tmp_path / "source", tie_word_embeddings=tied), tmp_path / "twin")
    model, scheme = load(twin), json.loads((twin / SCHEME_NAME).read_text())
    rounding = RoundedInputs(model, Twin(twin))
    scales = {address: rounds.scale for address, rounds in rounding.rounds.items()}
    assert scales == address_scales(model, scheme)
    with torch.inference_mode():
        with rounding:
            found = model(BLOCKS[:3]).logits
        with rounded_inputs(model, scales):
            expected = model(BLOCKS[:3]).logits
    assert difference(found.numpy(), expected) < ONE_STEP


def test_parity_compares_with_the_twin_whose_activations_are_rounded(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    twin = make_twin(source, tmp_path / "twin")
    package = make_package(twin, tmp_path / "package")
    limits = ParityConfig(max_perplexity_increase={"int8-qdq": 1.0}, decode_steps=4)
    parity = check_parity(ParitySubject(package, twin, source, BLOCKS, "int8-qdq", True), limits, silent)
    assert parity.passed, parity.breaches
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    assert result.twin.kl < 1e-6  # nothing but a step of a rounded input here and there
    assert result.finetuned.kl > 1e-3
    scales = json.loads((twin / SCHEME_NAME).read_text())
    own = scales["input_scales"]["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    right, own[0] = own[0], 0.01  # not what the file has
    (twin / SCHEME_NAME).write_text(json.dumps(scales))
    broken = check_parity(ParitySubject(package, twin, source, BLOCKS, "int8-qdq", True), limits, silent)
    what = f"the scale of what it reads is {right:.4g} in the file, 0.01 in the twin"
    assert broken.breaches[0] == f"{CPU}: weights: layer 1, expert 1, w2: {what}"
    # each token goes to all of them
    line = f"{CPU}: operator: layer 1, experts 0, 1, 2 on the graph's own input: relative error "
    assert broken.breaches[1].startswith(line)
    assert any("KL from the twin" in breach and "worst layer 1" in breach for breach in broken.breaches)


@pytest.mark.parametrize("tied", [True, False])
def test_estimated_bytes_are_the_bytes_written(tmp_path: Path, tied: bool) -> None:
    source = make_mixture(
        tmp_path / "source",
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    twin = make_twin(source, tmp_path / "twin")
    package = make_package(twin, tmp_path / "package")
    shapes = {name: entry.shape for name, entry in open_checkpoint(source).entries.items()}
    estimated, artifact = estimate_bytes(open_checkpoint(source).config, shapes, "int8-qdq", QuantizeConfig())
    # rotary tables, and the padding of pages
    assert estimated == pytest.approx((package / DATA_NAME).stat().st_size, rel=0.03)
    opened = Twin(twin)
    codes = sum(opened.weight(name).read().codes.nbytes for name in opened.scheme["tensors"])  # there while it is made
    # names and shapes in headers
    assert artifact == pytest.approx(codes + sum(path.stat().st_size for path in twin.glob("*.safetensors")), rel=0.03)


# Ranges


def test_a_histogram_that_grows_counts_as_one_that_knew_its_end() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1000, generator=generator) * scale for scale in (0.01, 3.0, 0.5, 40.0)]
    grown, whole = Magnitudes(), Magnitudes()
    for part in parts:
        grown.add(part)
    whole.add(torch.cat([parts[3], *parts[:3]]))
    assert (grown.largest, grown.end) == (whole.largest, whole.end)
    assert (grown.counts - whole.counts).abs().sum() <= 4  # values at the edge of a bin
    assert grown.choose_scale("largest") == pytest.approx(float(torch.cat(parts).abs().max()) / 127, rel=1e-6)


@pytest.mark.parametrize("tail", [0.0, 10.0, 100.0])
def test_a_clipped_range_has_the_smallest_squared_error(tail: float) -> None:
    """Against all ranges in float64 on the values themselves; a histogram knows them to 1/4096 of its end."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=200_000), tail * rng.normal(size=20)])
    magnitudes = Magnitudes()
    magnitudes.add(torch.from_numpy(values))

    def error(scale: float) -> float:
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).sum())

    largest = np.abs(values).max()
    best = min(error(bound / 127) for bound in np.linspace(largest / 64, largest, 64))
    clipped = error(magnitudes.choose_scale("clip"))
    assert clipped <= 1.02 * best
    assert clipped <= 1.001 * error(largest / 127)
    if tail == 10.0:
        assert clipped < 0.9 * error(largest / 127)  # else the case would say nothing


def test_ranges_of_nothing_and_of_zeros_are_positive_and_those_of_no_numbers_are_refused() -> None:
    magnitudes = Magnitudes()
    assert magnitudes.choose_scale("clip") == 1.0
    magnitudes.add(torch.zeros(3, 4))
    magnitudes.add(torch.zeros(0, 4))
    assert magnitudes.choose_scale("largest") == 1.0
    magnitudes.add(torch.tensor([-2.0, 0.0]))
    assert magnitudes.choose_scale("largest") == pytest.approx(2 / 127)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            magnitudes.add(torch.tensor([1.0, wrong]))


# What is refused


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    (tmp_path / "twin").mkdir()
    message = "variant 'int8-qdq' measures activations on text, and there is none; give blocks of it, or leave it out"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        quantize_checkpoint(source, tmp_path / "twin", "int8-qdq", QuantizeConfig(), silent)
    message = (
        "variant 'int8-qdq' is for providers that compute in 8 bits, and CUDA's computes its products as "
        "floats; leave it out"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        quantize_checkpoint(
            source,
            tmp_path / "twin",
            "int8-qdq",
            QuantizeConfig(),
            silent,
            QuantizeInputs(device="cuda", blocks=BLOCKS),
        )
    twin = make_twin(source, tmp_path / "another")
    message = (
        "export.lowering 'fused' cannot express layers.0.moe (qmoe: the QMoE operator takes no scales of "
        "activations); use 'auto'"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        make_package(twin, tmp_path / "package", lowering="fused")


def test_a_traced_model_is_refused_in_one_line(tmp_path: Path) -> None:
    model = OlmoeForCausalLM(
        OlmoeConfig(**SMALL | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 3})
    )
    model.save_pretrained(tmp_path / "source")
    message = f"{tmp_path / 'source'}: model_type olmoe is traced, and cannot be calibrated; leave out 'int8-qdq'"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        make_twin(tmp_path / "source", tmp_path / "twin")


def test_states_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 3e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(
        ExportError,
        match=rf"^{re.escape(f'{source}: what ')}'{name}' reads in layer 1 on calibration text is not finite$",
    ):
        make_twin(source, tmp_path / "twin")
