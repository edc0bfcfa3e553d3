"""The quantized checkpoint: its integers, its twin in torch, and what was promised about both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from dense2moe.export.errors import ExportError
from dense2moe.export.footprint import estimate_bytes
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.blockwise import dequantize, quantize
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.twin import SCHEME_NAME, FloatWeight, QuantizedWeight, Twin
from dense2moe.export.variant import Device, Variant
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

ZERO_POINTS = pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
# which needs text: test_static.py
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant != "int8-qdq")
QUANTIZED: tuple[Variant, ...] = ("int8", "int4")
WIDE = QuantizeConfig(method="search", block_size=16)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(directory: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    small = {
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**small | fields))
    model.to(dtype).save_pretrained(directory)
    return directory


def make_twin(
    source: Path, output: Path, variant: Variant, config: QuantizeConfig = WIDE, device: Device = "cpu"
) -> QuantizeFacts:
    output.mkdir()
    held_out = torch.randint(2, 90, (4, 12), generator=torch.Generator().manual_seed(0)) if variant == "mixed" else None
    return quantize_checkpoint(
        source, output, variant, config, silent, QuantizeInputs(device=device, held_out=held_out)
    )


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file after its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float32_twin_equals_its_source_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_mixture(tmp_path / "source", dtype)
    facts = make_twin(source, tmp_path / "twin", "float32")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "twin" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.to(torch.float32)), name  # every half-precision number is a float32
    assert not (tmp_path / "twin" / "scales.safetensors").exists()
    assert (facts.quantized_expert_share, facts.quantized_bytes, facts.num_quantized_tensors) == (0.0, 0, 0)
    assert facts.expert_bytes == 2 * 4 * 3 * 40 * 44 * 4  # layers, experts, matrices, sizes, bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float16_twin_is_its_source_rounded_once_but_for_routers_and_norms(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = make_mixture(tmp_path / "source", dtype)
    facts = make_twin(source, tmp_path / "twin", "float16")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "twin" / "model.safetensors")
    assert found.keys() == expected.keys()
    changed = set()
    for name, tensor in expected.items():
        exact = tensor.to(torch.float32)
        kept = "norm" in name or name.endswith("block_sparse_moe.gate.weight")
        assert found[name].dtype == torch.float32
        np.testing.assert_array_equal(
            found[name], exact if kept else exact.numpy().astype(np.float16).astype(np.float32), err_msg=name
        )
        changed |= set() if torch.equal(found[name], exact) else {name}
    assert (len(changed) > 0) is (dtype != torch.float16)
    assert (facts.quantized_expert_share, facts.quantized_bytes, facts.num_quantized_tensors) == (0.0, 0, 0)
    assert facts.expert_bytes == 2 * 4 * 3 * 40 * 44 * 2  # layers, experts, matrices, sizes, bytes


@pytest.mark.parametrize(
    ("variant", "device", "name", "value"),
    [
        # what lies below it is rounded to 65504
        (
            "float16",
            "cpu",
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
            65520.0,
        ),
        ("float16", "cuda", "model.layers.0.self_attn.q_proj.weight", -1e5),
        # a scale, the largest weight by 128
        (
            "int8",
            "cuda",
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
            65520.0 * 128,
        ),
        ("int4", "cuda", "model.layers.1.block_sparse_moe.experts.3.w2.weight", 1e30),
    ],
)
def test_a_weight_beyond_float16_is_refused_by_name(
    tmp_path: Path, variant: Variant, device: Device, name: str, value: float
) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = {key: tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    message = (
        f"{source}: tensor '{name}' holds {abs(value):.6g}; float16 reaches 65504; leave out the variants in float16, "
        "which are 'float16' and with export.device 'cuda' the quantized ones"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        make_twin(source, tmp_path / "twin", variant, device=device)
    make_twin(source, tmp_path / "on the CPU", "int8" if variant == "int8" else "float32")


def test_the_largest_float16_and_a_huge_norm_are_taken(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = {key: tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 65504
    tensors["model.norm.weight"][0] = 1e6  # float32 in every graph
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    make_twin(source, tmp_path / "twin", "float16")
    found = load_file(tmp_path / "twin" / "model.safetensors")
    assert (found["model.layers.0.self_attn.q_proj.weight"][0, 0], found["model.norm.weight"][0]) == (65504, 1e6)


@pytest.mark.parametrize("variant", QUANTIZED)
def test_scales_are_of_16_bits_and_for_cuda_of_float16_and_the_twin_is_made_of_them(
    tmp_path: Path, variant: Variant
) -> None:
    source = make_mixture(tmp_path / "source")
    make_twin(source, tmp_path / "cpu", variant)
    make_twin(source, tmp_path / "cuda", variant, device="cuda")
    for_cpu, for_cuda = (load_file(tmp_path / device / "scales.safetensors") for device in ("cpu", "cuda"))
    original, twin = load_file(source / "model.safetensors"), load_file(tmp_path / "cuda" / "model.safetensors")
    for name in (name for name in for_cuda if name.endswith(".scales")):
        assert (for_cpu[name].dtype, for_cuda[name].dtype) == (torch.bfloat16, torch.float16)
        torch.testing.assert_close(for_cuda[name].float(), for_cpu[name].float(), rtol=2**-8, atol=0)
        key = name.removesuffix(".scales")
        # Integers are rounded to the rounded scale, so a weight is half a step away at most, and a step more where it
        # was cut off.
        steps = for_cuda[name].float().abs().repeat_interleave(16, dim=1)[:, : original[key].shape[1]]
        assert ((twin[key] - original[key]).abs() <= 1.5 * steps + 1e-12).all()
    untouched = {name for name, tensor in original.items() if torch.equal(twin[name], tensor)}
    assert untouched == {name for name in original if "norm" in name or name.endswith("block_sparse_moe.gate.weight")}


@pytest.mark.parametrize("variant", QUANTIZED)
def test_every_expert_is_quantized_and_routers_and_norms_are_not(tmp_path: Path, variant: Variant) -> None:
    source = make_mixture(tmp_path / "source")
    facts = make_twin(source, tmp_path / "twin", variant)
    assert facts.quantized_expert_share == 1.0
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "twin" / "model.safetensors")
    integers = load_file(tmp_path / "twin" / "scales.safetensors")
    assert found.keys() == expected.keys()
    untouched = {name for name in expected if torch.equal(found[name], expected[name])}
    assert untouched == {name for name in expected if "norm" in name or name.endswith("block_sparse_moe.gate.weight")}
    assert integers.keys() == {f"{name}.{part}" for name in expected.keys() - untouched for part in ("scales",)}
    assert facts.num_quantized_tensors == len(expected) - len(untouched)
    assert sum("experts" in name for name in integers) == 2 * 4 * 3  # layers, experts, matrices


@ZERO_POINTS
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("variant", QUANTIZED)
def test_the_twin_holds_what_the_integers_stand_for(
    tmp_path: Path, variant: Variant, block_size: Any, zero_points: bool
) -> None:
    source = make_mixture(tmp_path / "source")
    config = QuantizeConfig(
        method="search", block_size=block_size, attention_bits="variant", embedding_bits=8, zero_points=zero_points
    )
    make_twin(source, tmp_path / "twin", variant, config)
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "twin" / "model.safetensors")
    twin = Twin(tmp_path / "twin")
    own = 8 if variant == "int8" else 4
    for name in twin.scheme["tensors"]:
        bits = 8 if "embed" in name else own
        direct = quantize(expected[name], bits, block_size, scale_type=torch.bfloat16, zero_points=zero_points)
        weight = twin.weight(name)
        assert isinstance(weight, QuantizedWeight)
        assert (weight.bits, weight.block_size, weight.shape) == (bits, block_size, tuple(expected[name].shape))
        assert torch.equal(weight.read().codes, direct.codes)
        assert torch.equal(weight.read().scales, direct.scales)
        assert not zero_points or torch.equal(weight.read().own_zero_points(), direct.own_zero_points())
        assert zero_points or weight.read().zero_points is None
        assert torch.equal(found[name], dequantize(direct, expected[name].shape[1], bits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_alone_loads_the_twin(tmp_path: Path, mixture_checkpoint: Path, variant: Variant) -> None:
    make_twin(mixture_checkpoint, tmp_path / "twin", variant, WIDE.model_copy(update={"max_perplexity_increase": 1.0}))
    model, report = MixtralForCausalLM.from_pretrained(tmp_path / "twin", output_loading_info=True)
    assert not any(report.values())  # no missing, unexpected or mismatched key
    assert model.dtype == torch.float32
    first_gate = load_file(tmp_path / "twin" / "model.safetensors")[
        "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    ]
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[0][: len(first_gate)], first_gate)
    texts = [
        AutoTokenizer.from_pretrained(path)("def f(x): return x").input_ids
        for path in (mixture_checkpoint, tmp_path / "twin")
    ]
    assert texts[0] == texts[1]


@ZERO_POINTS
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("variant", QUANTIZED)
def test_the_bytes_of_the_integers_follow_from_the_shapes(
    tmp_path: Path, variant: Variant, block_size: Any, zero_points: bool
) -> None:
    source = make_mixture(tmp_path / "source")
    config = QuantizeConfig(
        method="search",
        block_size=block_size,
        attention_bits="variant",
        embedding_bits="variant",
        zero_points=zero_points,
    )
    facts = make_twin(source, tmp_path / "twin", variant, config)
    bits = 8 if variant == "int8" else 4
    block_bytes = block_size * bits // 8 + 2  # codes and a scale of 16 bits

    def stored(rows: int, width: int) -> int:
        blocks = -(-width // block_size)
        return rows * (blocks * block_bytes + (-(-blocks * bits // 8) if zero_points else 0))

    experts = 2 * 4 * (2 * stored(44, 40) + stored(40, 44))
    attention = 2 * (2 * stored(40, 40) + 2 * stored(8, 40))
    assert facts.expert_bytes == experts
    assert facts.quantized_bytes == experts + attention + stored(96, 40)
    twin = Twin(tmp_path / "twin")
    parts = [part for name in twin.scheme["tensors"] for part in twin.weight(name).read().parts().values()]
    scales = sum(part.numel() for part in parts if part.dtype == torch.float32)
    assert sum(part.nbytes for part in parts) - 2 * scales == facts.quantized_bytes  # in memory they have 32 bits
    codes = sum(twin.weight(name).read().codes.nbytes for name in twin.scheme["tensors"])
    assert data_bytes(tmp_path / "twin" / "scales.safetensors") == facts.quantized_bytes - codes


class Made(NamedTuple):
    """A mixture whose weights dominate its package, and its twin."""

    source: Path
    twin: Path
    config: QuantizeConfig


@pytest.fixture(scope="module")
def make_large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant, Device, bool, bool], Made]:
    """Each twin of such mixtures once, whatever is written of it."""

    @cache
    def make_source(tied: bool) -> Path:
        # 0.5 M weights, against a graph of some 30 kB when it is unrolled
        return make_mixture(
            tmp_path_factory.mktemp("source"),
            hidden_size=128,
            intermediate_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )

    @cache
    def make(variant: Variant, device: Device, zero_points: bool, tied: bool) -> Made:
        budget = 600_000 if variant == "mixed" else None
        config = QuantizeConfig(
            method="search", block_size=32 if device == "cpu" else 64, budget=budget, zero_points=zero_points
        )
        source, twin = make_source(tied), tmp_path_factory.mktemp("large") / "twin"
        make_twin(source, twin, variant, config, device)
        return Made(source, twin, config)

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("variant", "device", "lowering", "zero_points"),
    [
        *((variant, "cpu", lowering, False) for variant in VARIANTS for lowering in ("fused", "unrolled")),
        *((variant, "cpu", "fused", True) for variant in QUANTIZED),
        *((variant, "cuda", "fused", False) for variant in VARIANTS),
        ("int4", "cuda", "grouped", True),
    ],
)
def test_estimated_bytes_are_the_bytes_written(
    make_large: Callable[[Variant, Device, bool, bool], Made],
    tmp_path: Path,
    variant: Variant,
    device: Device,
    lowering: Any,
    zero_points: bool,
    tied: bool,
) -> None:
    source, directory, config = make_large(variant, device, zero_points, tied)
    (tmp_path / "package").mkdir()
    facts = write_package(
        directory, tmp_path / "package", OnnxConfig(device=device, lowering=lowering, activation_bits=8), silent
    )
    checkpoint = open_checkpoint(source)
    package, artifact = estimate_bytes(checkpoint.config, shapes_of(checkpoint), variant, config, device)
    weights = sum(data_bytes(path) for path in directory.glob("*.safetensors"))
    if variant == "mixed":
        assert artifact > weights
        assert facts.package_bytes <= package == config.budget
        return
    twin = Twin(directory)
    # while it is made
    assert artifact == weights + sum(twin.weight(name).read().codes.nbytes for name in twin.scheme["tensors"])
    data = (tmp_path / "package" / "model.onnx_data").stat().st_size
    # Every tensor starts at a multiple of a page or so.
    assert package == pytest.approx(data, rel=0.03)
    if lowering == "fused":  # an unrolled graph has a dozen nodes an expert, which count only in a toy
        assert package == pytest.approx(facts.package_bytes, rel=0.03)
    assert facts.package_bytes == data + (tmp_path / "package" / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("variant", "lowering", "zero_points"),
    [
        (variant, lowering, zeros)
        for variant, zeros in zip(QUANTIZED, (False, True), strict=True)
        for lowering in ("fused", "grouped", "unrolled")
    ]
    + [("int4", "fused", False)],
)
def test_every_expert_weight_is_an_integer_of_the_package_and_its_bytes_are_the_arithmetic(
    tmp_path: Path, variant: Variant, lowering: Any, zero_points: bool
) -> None:
    hidden, inner, vocabulary, layers, experts, block_size = 256, 384, 512, 2, 4, 32
    source = make_mixture(
        tmp_path / "source",
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    facts = make_twin(
        source,
        tmp_path / "twin",
        variant,
        QuantizeConfig(method="search", block_size=block_size, zero_points=zero_points),
    )
    (tmp_path / "package").mkdir()
    write_package(tmp_path / "twin", tmp_path / "package", OnnxConfig(lowering=lowering), silent)
    own = 8 if variant == "int8" else 4

    def stored(elements: int, bits: int) -> float:
        return elements * bits / 8 + elements / block_size * (2 + (bits / 8 if zero_points else 0))

    expert_elements = layers * experts * 3 * hidden * inner
    attention_elements = layers * (2 * hidden * hidden + 2 * hidden * hidden // 2)
    embedding_elements = vocabulary * hidden  # table and head are the same bytes
    floats = layers * experts * hidden + (2 * layers + 1) * hidden  # routers and norms
    arithmetic = stored(expert_elements, own) + stored(attention_elements + embedding_elements, 8) + 4 * floats
    assert (tmp_path / "package" / "model.onnx_data").stat().st_size == pytest.approx(arithmetic, rel=0.03)
    assert facts.quantized_expert_share == 1.0
    assert facts.expert_bytes == stored(expert_elements, own)
    graph = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False).graph
    of_experts = {tensor.name: tensor for tensor in graph.initializer if ".moe." in tensor.name}
    kinds = {
        "codes": onnx.TensorProto.UINT8,
        "scales": onnx.TensorProto.BFLOAT16,
        "zero_points": onnx.TensorProto.UINT8,
    }
    assert all(tensor.data_type == kinds[name.rpartition(".")[2]] for name, tensor in of_experts.items())
    assert (
        sum(math.prod(tensor.dims) for name, tensor in of_experts.items() if name.endswith(".codes"))
        == expert_elements * own // 8
    )
    assert (
        sum(
            tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) >= hidden * inner
            for tensor in graph.initializer
        )
        == 0
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w1.weight", float("nan")),
        ("model.layers.0.block_sparse_moe.gate.weight", float("inf")),
        ("model.norm.weight", float("-inf")),
    ],
)
def test_a_tensor_that_is_not_finite_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, name: str, value: float, variant: Variant
) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = {key: tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name].view(-1)[5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    message = (
        f"{source / 'model.safetensors'}: tensor '{name}' holds 1 NaN or infinite values; the checkpoint is "
        "broken; use another"
    )
    for method in ("round", "search", "gptq"):
        twin = tmp_path / method
        twin.mkdir()
        with pytest.raises(UpcycleError, match=f"^{re.escape(message)}$"):
            quantize_checkpoint(
                source,
                twin,
                variant,
                QuantizeConfig(method=method),
                silent,
                QuantizeInputs(blocks=torch.ones(1, 8, dtype=torch.int64)),
            )
        assert list(twin.iterdir()) == []


@ZERO_POINTS
@pytest.mark.parametrize("method", ["round", "search", "gptq"])
def test_zero_matrices_and_equal_rows_stay_what_they_are_in_every_method(
    tmp_path: Path, method: Any, zero_points: bool
) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = {key: tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    prefix = "model.layers.0.block_sparse_moe.experts.0"
    tensors[f"{prefix}.w1.weight"].zero_()
    tensors[f"{prefix}.w3.weight"][:] = torch.linspace(-2, 2, 44)[:, None]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "twin").mkdir()
    blocks = torch.randint(0, 96, (64, 32), generator=torch.Generator().manual_seed(0))
    config = QuantizeConfig(method=method, block_size=16, zero_points=zero_points)
    facts = quantize_checkpoint(source, tmp_path / "twin", "int4", config, silent, QuantizeInputs(blocks=blocks))
    assert facts.num_matrices_with_few_tokens == 0
    found = load_file(tmp_path / "twin" / "model.safetensors")
    assert (found[f"{prefix}.w1.weight"] == 0).all()
    # A scale is rounded to the 8 bits of bfloat16; GPTQ also moves weights to make up for attention, which is quantized
    # before them: 1.4e-4 here.
    torch.testing.assert_close(
        found[f"{prefix}.w3.weight"], tensors[f"{prefix}.w3.weight"], rtol=2**-8 + 1e-3 * (method == "gptq"), atol=0
    )
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_tensor_that_the_family_does_not_know_is_refused(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(40)},
        source / "model.safetensors",
        {"format": "pt"},
    )
    message = (
        "tensor 'model.layers.0.self_attn.q_proj.bias' is not known to the mixtral family; it can be neither "
        "quantized nor exported"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        make_twin(source, tmp_path / "twin", "int8")
    assert list((tmp_path / "twin").iterdir()) == []


@pytest.mark.parametrize(("head", "expected"), [("embedding", 8), ("variant", 4), (8, 8), (16, 32)])
def test_the_head_may_have_bits_of_its_own(head: Any, expected: int, tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source", tie_word_embeddings=False)
    make_twin(source, tmp_path / "twin", "int4", QuantizeConfig(method="search", block_size=16, head_bits=head))
    twin = Twin(tmp_path / "twin")
    assert twin.scheme["tensors"].get("lm_head.weight", 32) == expected
    assert twin.scheme["tensors"]["model.embed_tokens.weight"] == 8


def test_a_head_that_is_the_embedding_has_no_bits_of_its_own(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source", tie_word_embeddings=True)
    with pytest.raises(
        ExportError,
        match=r"^quantize\.head_bits is 8, and this model's head is its embedding; leave it out; set embedding_bits$",
    ):
        make_twin(source, tmp_path / "twin", "int4", QuantizeConfig(method="search", head_bits=8))


@ZERO_POINTS
def test_the_scheme_beside_the_twin_says_what_was_done(tmp_path: Path, zero_points: bool) -> None:
    source = make_mixture(tmp_path / "source")
    facts = make_twin(
        source, tmp_path / "twin", "int4", QuantizeConfig(method="search", block_size=16, zero_points=zero_points)
    )
    scheme = json.loads((tmp_path / "twin" / "quantization.json").read_text())
    assert scheme["variant"] == "int4"
    assert scheme["bits"] == facts.bits
    assert scheme["zero_points"] is facts.zero_points is zero_points
    assert scheme["quantized_bytes"] == facts.quantized_bytes
    assert len(scheme["tensors"]) == facts.num_quantized_tensors
    with safe_open(tmp_path / "twin" / "scales.safetensors", "pt") as file:
        for name, bits in scheme["tensors"].items():
            found = Twin(tmp_path / "twin").weight(name).read()
            rows, blocks, block_bytes = found.codes.shape
            assert block_bytes == 16 * bits // 8
            assert file.get_slice(f"{name}.scales").get_shape() == [rows, blocks]


def test_a_float_weight_is_read_as_it_is(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    make_twin(source, tmp_path / "twin", "int4")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    weight = Twin(tmp_path / "twin").weight(name)
    assert isinstance(weight, FloatWeight)
    assert weight.shape == (4, 40)
    np.testing.assert_array_equal(weight.read(), load_file(source / "model.safetensors")[name])


def test_progress_counts_to_the_end_of_every_pass(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    (tmp_path / "twin").mkdir()
    seen: list[tuple[str, int, int]] = []
    quantize_checkpoint(source, tmp_path / "twin", "int8", WIDE, lambda *step: seen.append(step))
    count = len(open_checkpoint(source).entries)
    num_integers = sum(
        bits < 32 for bits in json.loads((tmp_path / "twin" / SCHEME_NAME).read_text())["tensors"].values()
    )
    expected = [("quantizing", n, num_integers) for n in range(1, num_integers + 1)]
    checked, written = (
        [(what, n, count) for n in range(1, count + 1)] for what in ("checking weights", "writing the twin")
    )
    assert seen == checked + expected + written
