"""Layers of experts for tests: every way to write one, its graph, and the values that it must compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from transformers.activations import ACT2FN

from dense2moe.export.coverage import ACTIVATIONS
from dense2moe.export.lowering import (
    GROUPED,
    MOE,
    QMOE,
    SWITCHED,
    UNROLLED,
    Expert,
    Lowering,
    MoeInput,
    MoeLayer,
)
from dense2moe.export.nodes.linear import Linear
from dense2moe.export.nodes.writer import IR_VERSION, OPSETS, GraphWriter, graph_input, int64
from dense2moe.export.quantization.blockwise import dequantize, quantize
from dense2moe.export.quantization.twin import Bias, FloatWeight, QuantizedWeight
from dense2moe.export.variant import ElementType, scale_type
from dense2moe.upcycle.checkpoints.headers import index_tensors
from dense2moe.upcycle.gates.gate import Above, Gate, Mass, Near, TopK


class Way(NamedTuple):
    """A lowering, the bits of its weights and activations, the error allowed relative to the largest output.

    What the graph computes in, and
    whether blocks have zero points.
    """

    lowering: Lowering
    bits: int
    activation_bits: int
    tolerance: float
    element_type: ElementType = "float32"
    zero_points: bool = False


# Float32 sums of at most 172 products, twice: 7e-7 measured. Activations rounded to 8 bits: 1/254 of the largest a
# factor, 2e-2 measured. Float16 rounds the input, each product, the gate and (for an operator) the routing by 2^-11 of
# itself: 9e-4 measured.
WAYS = {
    "moe": Way(MOE, 32, 32, 2e-6),
    "qmoe_4": Way(QMOE, 4, 32, 2e-6),
    "qmoe_4_rounding": Way(QMOE, 4, 8, 3e-2),
    "qmoe_8_rounding": Way(QMOE, 8, 8, 3e-2),
    "grouped": Way(GROUPED, 32, 32, 2e-6),
    "grouped_4": Way(GROUPED, 4, 32, 2e-6),
    "grouped_4_rounding": Way(GROUPED, 4, 8, 3e-2),
    "grouped_8": Way(GROUPED, 8, 32, 2e-6),
    "grouped_8_rounding": Way(GROUPED, 8, 8, 3e-2),
    "unrolled": Way(UNROLLED, 32, 32, 2e-6),
    "unrolled_4": Way(UNROLLED, 4, 32, 2e-6),
    "unrolled_4_rounding": Way(UNROLLED, 4, 8, 3e-2),
    "unrolled_8": Way(UNROLLED, 8, 32, 2e-6),
    "unrolled_8_rounding": Way(UNROLLED, 8, 8, 3e-2),
    "switched_4": Way(SWITCHED, 4, 32, 2e-6),
    "switched_4_rounding": Way(SWITCHED, 4, 8, 3e-2),
    "switched_8_rounding": Way(SWITCHED, 8, 8, 3e-2),
    "switched_4_float16": Way(SWITCHED, 4, 32, 2e-3, "float16"),
    "switched_4_zero_points": Way(SWITCHED, 4, 32, 2e-6, zero_points=True),
    "moe_float16": Way(MOE, 16, 32, 2e-3, "float16"),
    "qmoe_4_float16": Way(QMOE, 4, 32, 2e-3, "float16"),
    "qmoe_8_rounding_float16": Way(QMOE, 8, 8, 3e-2, "float16"),
    "grouped_float16": Way(GROUPED, 16, 32, 2e-3, "float16"),
    "grouped_4_float16": Way(GROUPED, 4, 32, 2e-3, "float16"),
    "grouped_4_rounding_float16": Way(GROUPED, 4, 8, 3e-2, "float16"),
    "unrolled_float16": Way(UNROLLED, 16, 32, 2e-3, "float16"),
    "unrolled_8_float16": Way(UNROLLED, 8, 32, 2e-3, "float16"),
    "qmoe_4_zero_points": Way(QMOE, 4, 32, 2e-6, zero_points=True),
    "qmoe_4_rounding_zero_points": Way(QMOE, 4, 8, 3e-2, zero_points=True),
    "qmoe_8_rounding_zero_points": Way(QMOE, 8, 8, 3e-2, zero_points=True),
    "grouped_4_zero_points": Way(GROUPED, 4, 32, 2e-6, zero_points=True),
    "grouped_4_rounding_zero_points": Way(GROUPED, 4, 8, 3e-2, zero_points=True),
    "unrolled_8_zero_points": Way(UNROLLED, 8, 32, 2e-6, zero_points=True),
    "qmoe_4_float16_zero_points": Way(QMOE, 4, 32, 2e-3, "float16", zero_points=True),
    "grouped_8_float16_zero_points": Way(GROUPED, 8, 32, 2e-3, "float16", zero_points=True),
}


class Inside(NamedTuple):
    """What experts have inside; the activation by its name in transformers."""

    activation: str = "silu"
    gated: bool = True
    biased: bool = False

    def __str__(self) -> str:
        return f"{self.activation}{', gated' if self.gated else ''}{', biases' if self.biased else ''}"


GATED = Inside()


class Matrices(NamedTuple):
    """The values of an expert."""

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | float = 0.0
    up_bias: np.ndarray | float = 0.0
    down_bias: np.ndarray | float = 0.0


def make_layer(
    directory: Path,
    way: Way,
    gate: Gate,
    hidden: int = 64,
    inner: int = 96,
    block: int = 32,
    equal: bool = False,
    selection_bias: np.ndarray | None = None,
    inside: Inside = GATED,
) -> tuple[MoeLayer, list[Matrices]]:
    """A layer whose weights lie in `directory`, and the values that they stand for.

    Biases are stacked: those of the first matrices of all experts, the gate's before up's, and those of the last.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: list[dict[str, np.ndarray]] = []
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not inside.gated:
        del shapes["gate"]
    for number in range(gate.num_experts):
        generator = torch.Generator().manual_seed(0 if equal else number)
        values.append({})
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            if way.bits >= 16:
                weight = weight.to(getattr(torch, way.element_type)).to(torch.float32)
                tensors[f"{number}.{name}"] = weight
            else:
                quantized = quantize(
                    weight,
                    way.bits,
                    block,
                    scale_type=getattr(torch, scale_type(way.element_type)),
                    zero_points=way.zero_points,
                )
                tensors[f"{number}.{name}.scales"] = quantized.scales
                if way.zero_points:
                    tensors[f"{number}.{name}.zero_points"] = quantized.own_zero_points()
                tensors[f"{number}.{name}"] = weight = dequantize(quantized, shape[1], way.bits)
            values[-1][name] = weight.double().numpy()
    biases = {"first": inner * (2 if inside.gated else 1), "last": hidden} if inside.biased else {}
    for name, size in biases.items():
        drawn = torch.randn((gate.num_experts, size), generator=torch.Generator().manual_seed(size)) / 2
        tensors[f"{name}_bias"] = drawn.to(getattr(torch, way.element_type)).to(torch.float32)
        for expert, own in zip(values, tensors[f"{name}_bias"].double().numpy(), strict=True):
            parts = ("down",) if name == "last" else ("gate", "up") if inside.gated else ("up",)
            expert |= {f"{part}_bias": piece for part, piece in zip(parts, np.split(own, len(parts)), strict=True)}
    if selection_bias is not None:
        tensors["selection_bias"] = torch.from_numpy(selection_bias)[None]
    save_file(tensors, directory / "layer.safetensors")
    entries = index_tensors(directory, "layer")

    def weight_of(number: int, name: str, shape: tuple[int, int]) -> FloatWeight | QuantizedWeight:
        entry = entries[f"{number}.{name}"]
        return (
            FloatWeight(entry)
            if way.bits >= 16
            else QuantizedWeight(entry, entries, shape, way.bits, block, zero_points=way.zero_points)
        )

    def bias_of(name: str, place: int, size: int) -> Bias | None:
        return Bias(entries[name], (size * place, size * (place + 1))) if inside.biased else None

    def expert(n: int) -> Expert:
        gate_bias, up_bias = (bias_of("first_bias", 2 * n + part if inside.gated else n, inner) for part in (0, 1))
        return Expert(
            Linear(weight_of(n, "gate", shapes["gate"]), gate_bias) if inside.gated else None,
            Linear(weight_of(n, "up", shapes["up"]), up_bias),
            Linear(weight_of(n, "down", shapes["down"]), bias_of("last_bias", n, hidden)),
        )

    bias = FloatWeight(entries["selection_bias"]) if selection_bias is not None else None
    experts = tuple(expert(n) for n in range(gate.num_experts))
    activation = ACTIVATIONS[inside.activation]
    layer = MoeLayer("layer", gate, experts, way.activation_bits, activation, bias, way.element_type)
    return layer, [Matrices(own.pop("gate", None), **own) for own in values]


def build(layer: MoeLayer, lowering: Lowering, float_type: ElementType | None = None) -> onnx.ModelProto:
    """-layer(-x): the layer between two other nodes, which is where the operators went wrong."""
    graph = GraphWriter(layer.element_type, float_type)
    x = graph_input("x", ir.DataType.FLOAT, ["batch", "length", layer.hidden_size])
    router_logits = graph_input("router_logits", ir.DataType.FLOAT, ["tokens", layer.gate.num_experts])
    hidden = graph.op("Neg", [x], "hidden")
    tokens = graph.op("Reshape", [graph.narrow(hidden), graph.constant("flat", int64(-1, layer.hidden_size))], "tokens")
    y = graph.op("Neg", [lowering.lower(graph, layer, MoeInput(hidden, tokens, router_logits))], "y")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "length", layer.hidden_size])
    initializers = list(graph.initializers.values())
    written = ir.Graph(
        [x, router_logits], [y], nodes=graph.nodes, initializers=initializers, opset_imports=OPSETS, name="layer"
    )
    return ir.to_proto(ir.Model(written, ir_version=IR_VERSION))


def load(layer: MoeLayer, lowering: Lowering) -> ort.InferenceSession:
    needed = lowering.min_onnxruntime(layer)
    if Version(ort.__version__) < Version(needed):
        pytest.skip(f"this layer needs onnxruntime {needed}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(build(layer, lowering).SerializeToString(), options)


@cache
def loaded(
    way: Way, gate: Gate, equal: bool = False, inside: Inside = GATED
) -> tuple[MoeLayer, list[Matrices], ort.InferenceSession]:
    """A layer of the usual sizes, its values, and its graph, each made once."""
    with TemporaryDirectory() as folder:
        layer, values = make_layer(Path(folder), way, gate, equal=equal, inside=inside)
        return layer, values, load(layer, way.lowering)


def run(session: ort.InferenceSession, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return -session.run(None, {"x": -x, "router_logits": logits})[0]


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum(),
    "sigmoid": lambda row: 1 / (1 + np.exp(-row)),
    "relu": lambda row: np.maximum(row, 0),
}


def visit(gate: Gate, best: list[int], scores: np.ndarray) -> list[int]:
    """Of a token's best experts those that it visits, one after the other."""
    visited, reached = [best[0]], scores[best[0]]
    for expert in best[1:]:
        match gate.choice:
            case Above(level):
                goes = scores[expert] > level
            case Mass(share):
                goes = reached < share * scores.sum()
            case Near(share):
                goes = scores[expert] >= share * scores[best[0]]
            case _:
                goes = True
        if goes:
            visited.append(expert)
        reached += scores[expert]
    return visited


def compute(
    values: list[Matrices],
    gate: Gate,
    x: np.ndarray,
    logits: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "silu",
) -> np.ndarray:
    """The layer, a token and an expert at a time, in float64, with transformers' activation."""
    activate = ACT2FN[activation]
    tokens = x.reshape(-1, x.shape[-1]).astype(np.float64)
    result = np.zeros_like(tokens)
    for n, (token, row) in enumerate(zip(tokens, logits.astype(np.float64), strict=True)):
        scores = SCORES[gate.score](row)
        ranks = (row if gate.score == "relu" else scores) if bias is None else scores + bias
        chosen = visit(gate, sorted(range(len(row)), key=lambda e: -ranks[e])[: gate.max_experts_per_token], ranks)
        if gate.score == "relu" and gate.renormalize:
            scores[chosen[0]] = max(scores[chosen[0]], 1e-20)
        total = sum(scores[e] for e in chosen) + 1e-20 * (gate.score == "sigmoid") if gate.renormalize else 1.0
        for e in chosen:
            own = values[e]
            inner = own.up @ token + own.up_bias
            active = inner if own.gate is None else own.gate @ token + own.gate_bias
            active = activate(torch.from_numpy(active)).numpy()
            inner = active if own.gate is None else active * inner
            result[n] += gate.scale * scores[e] / total * (own.down @ inner + own.down_bias)
    return result.reshape(x.shape)


def draw(batch: int, length: int, hidden: int, num_experts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((batch, length, hidden), np.float32), random.standard_normal(
        (batch * length, num_experts), np.float32
    )


def assert_close(found: np.ndarray, expected: np.ndarray, way: Way) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=way.tolerance * np.abs(expected).max())


def softmax(num_experts: int, k: int, renormalize: bool = True, scale: float = 1.0) -> Gate:
    return Gate(num_experts, TopK(k), "softmax", renormalize, scale)


def routed(score: Any = "softmax", renormalize: bool = True, scale: float = 1.0, selection_bias: bool = False) -> Gate:
    return Gate(4, TopK(2), score, renormalize, scale, selection_bias)
