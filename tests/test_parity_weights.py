"""Rows of a file are recognized in every format, order and stack, and a wrong one is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from transformers import MixtralConfig

from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.differences import find_nearest
from dense2moe.export.parity.weights.matrix import Operator
from dense2moe.export.parity.weights.rows import FoundWeights, check_weights
from dense2moe.export.quantization.blockwise import Quantized, dequantize, join, quantize, unpack
from dense2moe.export.quantization.simulation import StaticRounding
from dense2moe.export.storage import MODEL_NAME

WIDTH, INNER, TOKENS, EXPERTS, BLOCK = 32, 48, 80, 2, 16
LAYER = "model.layers.0"
EXPERT = f"{LAYER}.block_sparse_moe.experts"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY, ROUTER = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.block_sparse_moe.gate.weight"
NORM = f"{LAYER}.input_layernorm.weight"
Form = Literal["float", "turned", "int8", "int4"]
Tensors = Mapping[str, Quantized]


def bits_of(form: Form) -> int:
    return 4 if form == "int4" else 8


@cache
def draw(form: Form) -> Tensors:
    """Matrices as integers, whatever the file holds; so that every form stands for the same kind of numbers.

    Drawn once; a fault is in a mapping of its own.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {EMBEDDING: (TOKENS, WIDTH), HEAD: (TOKENS, WIDTH), QUERY: (WIDTH, WIDTH)}
    for e in range(EXPERTS):
        shapes |= {
            f"{EXPERT}.{e}.w1.weight": (INNER, WIDTH),
            f"{EXPERT}.{e}.w2.weight": (WIDTH, INNER),
            f"{EXPERT}.{e}.w3.weight": (INNER, WIDTH),
        }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return MappingProxyType(
        {name: quantize(weight, bits_of(form), BLOCK, zero_points=form == "int4") for name, weight in weights.items()}
    )


def width_of(name: str) -> int:
    return INNER if ".w2." in name else WIDTH


def value(tensors: Tensors, name: str, form: Form) -> torch.Tensor:
    return dequantize(tensors[name], width_of(name), bits_of(form))


def floats(form: Form) -> dict[str, torch.Tensor]:
    """What is no integers in any form: a router, and a norm."""
    generator = torch.Generator().manual_seed(1)
    return {
        ROUTER: torch.randn(EXPERTS, WIDTH, generator=generator),
        NORM: torch.rand(WIDTH, generator=generator) + 0.5,
    }


def write_twin(folder: Path, form: Form) -> Path:
    folder.mkdir()
    tensors = {name: value(draw(form), name, form) for name in draw(form)} | floats(form)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    MixtralConfig(hidden_size=WIDTH, num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(folder)
    return folder


class Builder:
    """A graph that nobody runs: each matrix in some node's format."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []

    def constant(self, array: np.ndarray | torch.Tensor, name: str) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), f"c{len(self.tensors)}.{name}"))
        return self.tensors[-1].name

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: float) -> None:
        self.nodes.append(helper.make_node(op, inputs, [f"v{len(self.nodes)}"], domain=domain, **attributes))

    def integers(self, q: Quantized) -> list[str]:
        """Codes, scales and zero points, the last maybe left out."""
        zeros = [] if q.zero_points is None else [self.constant(q.zero_points.flatten(), "zeros")]
        return [self.constant(q.codes, "codes"), self.constant(q.scales.flatten(), "scales"), *zeros]

    def table(self, q: Quantized) -> None:
        """Integers of 8 bits gathered, and made floats of by nodes of no one operator."""
        self.node("Gather", [self.constant(q.codes, "codes"), "x"])
        self.node("Cast", [self.nodes[-1].output[0]], to=TensorProto.FLOAT)
        self.node("Sub", [self.nodes[-1].output[0], self.constant(np.float32(128), "zero")])
        integers = self.nodes[-1].output[0]
        self.node("Gather", [self.constant(q.scales, "scales"), "x"])
        self.node("Unsqueeze", [self.nodes[-1].output[0], self.constant(np.array([-1]), "axis")])
        self.node("Mul", [integers, self.nodes[-1].output[0]])
        self.node("Reshape", [self.nodes[-1].output[0], self.constant(np.array([0, 0, -1]), "flat")])

    def operator_norm(self, weight: torch.Tensor, epsilon: float) -> None:
        self.node("SimplifiedLayerNormalization", ["x", self.constant(weight, "norm")], epsilon=epsilon)

    def norm_in_parts(self, weight: torch.Tensor, epsilon: float) -> None:
        """In 16 bits, with a reciprocal of a root as its division."""
        small = np.array(epsilon, np.float16)
        self.node("Mul", ["x", "x"])
        self.node("ReduceMean", [self.nodes[-1].output[0], self.constant(np.array([-1]), "axis")])
        self.node("Add", [self.constant(small, "epsilon"), self.nodes[-1].output[0]])
        self.node("Sqrt", [self.nodes[-1].output[0]])
        self.node("Reciprocal", [self.nodes[-1].output[0]])
        self.node("Mul", ["x", self.nodes[-1].output[0]])
        self.node("Mul", [self.constant(weight.half(), "norm"), self.nodes[-1].output[0]])

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "graph", inputs, [], self.tensors)
        onnx.save(
            helper.make_model(
                graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
            ),
            folder / MODEL_NAME,
        )
        return folder


def stacked(parts: list[Quantized]) -> Quantized:
    return join(parts, torch.stack)


def write_package(folder: Path, tensors: Tensors, form: Form, others: dict[str, torch.Tensor]) -> Path:
    """Every exporter's habits: matrices turned or not, stacked, interleaved, cast, packed."""
    b = Builder()
    b.constant(others[NORM], "norm")
    b.node("MatMul", ["x", b.constant(others[ROUTER].T, "router")])
    names = [f"{EXPERT}.{e}" for e in range(EXPERTS) if f"{EXPERT}.{e}.w2.weight" in tensors]
    match form:
        case "float":
            b.node("Gather", [b.constant(value(tensors, EMBEDDING, form), "table"), "x"])
            for name in (QUERY, HEAD):
                b.node("MatMul", ["x", b.constant(value(tensors, name, form).T, "weight")])
            first = [
                torch.stack(
                    [value(tensors, f"{n}.w1.weight", form), value(tensors, f"{n}.w3.weight", form)], 1
                ).flatten(0, 1)
                for n in names
            ]
            last = [value(tensors, f"{n}.w2.weight", form) for n in names]
            given = [b.constant(torch.stack(first), "fc1"), "", b.constant(torch.stack(last), "fc2")]
            b.node("MoE", ["x", "x", *given], "com.microsoft", k=1)
        case "turned":
            b.table(tensors[EMBEDDING])
            b.node("Gemm", ["x", b.constant(value(tensors, QUERY, form), "weight")], transB=1)
            b.node("Transpose", [b.constant(value(tensors, HEAD, form), "weight")], perm=[1, 0])
            b.node("MatMul", ["x", b.nodes[-1].output[0]])
            for name in names:  # up before gate, below each other
                both = torch.cat([value(tensors, f"{name}.w3.weight", form), value(tensors, f"{name}.w1.weight", form)])
                b.node("MatMul", ["x", b.constant(both.T, "weight")])
                codes = unpack(tensors[f"{name}.w2.weight"].codes.flatten(1), 8)[:, :INNER].to(torch.int16) - 128
                scales = tensors[f"{name}.w2.weight"].scales
                given = [b.constant(codes.to(torch.int8).T, "codes"), b.constant(scales.T, "scales")]
                b.node("DequantizeLinear", given, axis=0, block_size=BLOCK)
                b.node("MatMul", ["x", b.nodes[-1].output[0]])
        case "int8" | "int4":
            sizes = {"bits": bits_of(form), "block_size": BLOCK}
            codes, scales, *zeros = tensors[EMBEDDING].parts().values()
            table = [
                b.constant(codes.flatten(1), "codes"),
                "x",
                b.constant(scales, "scales"),
                *(b.constant(zero, "zeros") for zero in zeros),
            ]
            b.node("GatherBlockQuantized", table, "com.microsoft", **sizes)
            for name in (QUERY, HEAD):
                b.node(
                    "MatMulNBits",
                    ["x", *b.integers(tensors[name])],
                    "com.microsoft",
                    N=len(tensors[name].scales),
                    K=WIDTH,
                    **sizes,
                )
            if form == "int4":
                firsts = [stacked([tensors[f"{n}.w1.weight"], tensors[f"{n}.w3.weight"]]) for n in names]
                first = stacked(
                    [Quantized(*(part.transpose(0, 1).flatten(0, 1) for part in q.parts().values())) for q in firsts]
                )
                last = stacked([tensors[f"{n}.w2.weight"] for n in names])
                given = [""] * 13
                given[:2] = ["x", "x"]
                for q, place, zero in ((first, 2, 11), (last, 5, 12)):
                    given[place] = b.constant(q.codes.flatten(2), "codes")
                    given[place + 1] = b.constant(q.scales, "scales")
                    given[zero] = b.constant(q.own_zero_points(), "zeros")
                b.node("QMoE", given, "com.microsoft", expert_weight_bits=4, block_size=BLOCK, k=1)
                return b.save(folder)
            for name in names:
                both = join([tensors[f"{name}.w3.weight"], tensors[f"{name}.w1.weight"]])
                b.node("MatMulNBits", ["x", *b.integers(both)], "com.microsoft", N=2 * INNER, K=WIDTH, **sizes)
                b.node(
                    "MatMulNBits",
                    ["x", *b.integers(tensors[f"{name}.w2.weight"])],
                    "com.microsoft",
                    N=WIDTH,
                    K=INNER,
                    **sizes,
                )
    return b.save(folder)


Plant = Callable[[Tensors], Tensors]


def judge(
    tmp_path: Path, form: Form, plant: Plant = lambda tensors: tensors, others: dict[str, torch.Tensor] | None = None
) -> FoundWeights:
    package = write_package(tmp_path / "package", plant(draw(form)), form, others or floats(form))
    return check_weights(read_constants(package), write_twin(tmp_path / "twin", form))


@pytest.mark.parametrize("form", get_args(Form))
def test_every_row_of_a_right_file_is_found(tmp_path: Path, form: Form) -> None:
    found = judge(tmp_path, form)
    assert (found.check.num_wrong, found.check.wrong, found.check.not_judged) == (0, (), ())
    assert found.check.num_rows == 2 * TOKENS + WIDTH + EXPERTS * (2 * INNER + WIDTH) + EXPERTS
    assert found.check.num_vectors == 1
    assert set(found.operators) == {*draw(form), ROUTER}
    assert {matrix.use for matrix in found.operators[EMBEDDING]} == {"table"}
    operators = {name: matrices[0].operator for name, matrices in found.operators.items()}
    last = operators[f"{EXPERT}.1.w2.weight"]
    expected = {
        "float": (Operator("MatMul"), Operator("MoE")),
        "turned": (Operator("Gemm"), Operator("DQ", 8)),
        "int8": (Operator("MatMulNBits", 8, BLOCK), Operator("MatMulNBits", 8, BLOCK)),
        "int4": (Operator("MatMulNBits", 4, BLOCK, zero_points=True), Operator("QMoE", 4, BLOCK, zero_points=True)),
    }
    assert (operators[QUERY], last) == expected[form]


def scaled(name: str, row: int, factor: float, blocks: slice = slice(None)) -> Plant:
    """A row, or some blocks of it, times a factor."""

    def plant(tensors: Tensors) -> Tensors:
        scales = tensors[name].scales.clone()
        scales[row, blocks] *= factor
        return {**tensors, name: replace(tensors[name], scales=scales)}

    return plant


def permuted(names: list[str], order: list[int], rows: slice | list[int] = slice(None)) -> Plant:
    """Rows of some tensors, joined, in another order."""

    def plant(tensors: Tensors) -> Tensors:
        parts = [{part: tensor.clone() for part, tensor in tensors[name].parts().items()} for name in names]
        for part in parts[0]:
            old = [each[part][rows].clone() for each in parts]
            for number, source in enumerate(order):
                parts[number % len(parts)][part][rows if len(parts) > 1 else rows[number]] = (
                    old[source] if len(parts) > 1 else old[0][source]
                )
        return {**tensors, **{name: Quantized(**each) for name, each in zip(names, parts, strict=True)}}

    return plant


def without(name: str) -> Plant:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("form", get_args(Form))
def test_a_wrong_row_is_named_with_what_is_wrong_in_it(tmp_path: Path, form: Form) -> None:
    last, gate = f"{EXPERT}.1.w2.weight", f"{EXPERT}.0.w1.weight"
    some = value(draw(form), last, form)[3, 16:32].nonzero()[:, 0].tolist()
    columns, taken = f"columns {16 + some[0]} to {16 + some[-1]}", "row 4: belongs to another token, or to none"
    expected: list[tuple[Plant, str, int]] = [
        (scaled(last, 3, 1.5), "layer 0, expert 1, w2, row 3: the whole row in the file is 1.5 times the twin's", 1),
        (
            scaled(last, 3, 1.5, slice(1, 2)),
            f"layer 0, expert 1, w2, row 3: {columns} in the file are 1.5 times the twin's",
            1,
        ),
        (scaled(gate, 7, 0.0), "layer 0, expert 0, w1, row 7: is all zeros in the file", 1),
        (scaled(QUERY, 9, -1.0), "layer 0, attention's q_proj, row 9: no row of the file equals the twin's", 1),
        (scaled(HEAD, 4, 1.01), "the head, row 4: the whole row in the file is 1.01 times the twin's", 1),
        (scaled(HEAD, 4, float("nan")), "the head, row 4: no row of the file equals the twin's", 1),
        (
            permuted([EMBEDDING], [1, 0], [4, 5]),
            f"the embedding: 2 of {TOKENS} rows differ from the twin's; {taken}",
            2,
        ),
        (permuted([HEAD], [1, 0], [4, 5]), f"the head: 2 of {TOKENS} rows differ from the twin's; {taken}", 2),
    ]
    for number, (plant, line, count) in enumerate(expected):
        folder = tmp_path / str(number)
        folder.mkdir()
        check = judge(folder, form, plant).check
        assert (list(map(str, check.wrong)), check.num_wrong) == ([line], count)


@pytest.mark.parametrize("form", get_args(Form))
def test_the_order_of_rows_is_the_exporter_s_own(tmp_path: Path, form: Form) -> None:
    """What a swap of experts does to the outputs is told by the operator; all rows are there."""
    plant = permuted([f"{EXPERT}.0.w2.weight", f"{EXPERT}.1.w2.weight"], [1, 0])
    assert judge(tmp_path, form, plant).check.num_wrong == 0


def test_an_expert_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    check = judge(tmp_path, "int8", without(f"{EXPERT}.1.w2.weight")).check
    assert [(wrong.tensor, wrong.count) for wrong in check.wrong] == [
        ("layer 0, expert 1, w1", INNER),
        ("layer 0, expert 1, w3", INNER),
        ("layer 0, expert 1, w2", WIDTH),
    ]
    assert {wrong.what for wrong in check.wrong} == {"no row of the file equals the twin's"}
    assert check.num_wrong == 2 * INNER + WIDTH


def test_an_expert_that_is_the_copy_of_another_is_found_for_both(tmp_path: Path) -> None:
    """Upcycling starts with copies; the file may have one matrix for all of them."""
    twin, tensors = tmp_path / "twin", draw("float")
    copies = {**tensors, **{f"{EXPERT}.1.w{n}.weight": tensors[f"{EXPERT}.0.w{n}.weight"] for n in (1, 2, 3)}}
    package = write_package(tmp_path / "package", copies, "float", floats("float"))
    twin.mkdir()
    values = {name: value(copies, name, "float").contiguous() for name in copies} | floats("float")
    save_file(values, twin / "model.safetensors", {"format": "pt"})
    MixtralConfig(hidden_size=WIDTH, num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(twin)
    assert check_weights(read_constants(package), twin).check.num_wrong == 0


def test_a_wrong_vector_is_named(tmp_path: Path) -> None:
    others = floats("float")
    others[NORM] = others[NORM].clone()
    others[NORM][7] *= 1.01
    check = judge(tmp_path, "float", others=others).check
    assert list(map(str, check.wrong)) == ["layer 0, input_layernorm: element 7 in the file is 1.01 times the twin's"]


@pytest.mark.parametrize("build", [Builder.operator_norm, Builder.norm_in_parts])
def test_another_epsilon_of_a_norm_is_named(
    tmp_path: Path, build: Callable[[Builder, torch.Tensor, float], None]
) -> None:
    norms = {f"model.layers.{n}.input_layernorm.weight": torch.rand(WIDTH) for n in range(3)}
    twin = tmp_path / "twin"
    twin.mkdir()
    save_file(norms, twin / "model.safetensors", {"format": "pt"})
    MixtralConfig(hidden_size=WIDTH, num_hidden_layers=3, rms_norm_eps=1e-6).save_pretrained(twin)
    line = "layer 1, input_layernorm: epsilon in the file is 1e-05, the twin's 1e-06"
    told = {(1e-6, 1e-6): [], (1e-5, 1e-6): [line], (1e-5, 1e-5): [f"{line}; and in 1 more norm"]}
    for number, (epsilons, lines) in enumerate(told.items()):
        b = Builder()
        for weight, epsilon in zip(norms.values(), (1e-6, *epsilons), strict=True):
            build(b, weight, epsilon)
        build(b, torch.rand(WIDTH), 0.1)  # of the graph's own
        check = check_weights(read_constants(b.save(tmp_path / str(number))), twin).check
        assert (list(map(str, check.wrong)), check.num_wrong) == (lines, len(lines))


@pytest.mark.parametrize(
    ("zero", "ends"),
    [(None, (0, 255)), (np.uint8(7), (-7, 248)), (np.int8(0), (-128, 127)), (np.int8(-3), (-125, 130))],
)
def test_the_scale_and_ends_of_a_rounded_input_are_read(
    tmp_path: Path, zero: np.generic | None, ends: tuple[int, int]
) -> None:
    b = Builder()
    scales = [b.constant(np.float32(0.5), "scale"), *([] if zero is None else [b.constant(np.array(zero), "zero")])]
    b.node("QuantizeLinear", ["x", *scales])
    b.node("DequantizeLinear", [b.nodes[-1].output[0], *scales])
    given = b.nodes[-1].output[0]
    codes = np.ones((WIDTH, WIDTH), np.int8)
    b.node("DequantizeLinear", [b.constant(codes, "codes"), b.constant(np.float32(1), "scale")])
    b.node("MatMul", [given, b.nodes[-1].output[0]])
    (matrix,) = read_constants(b.save(tmp_path / "package")).matrices
    assert matrix.input_rounding == StaticRounding(0.5, *ends)


def test_a_router_rounded_to_8_bits_is_another_router(tmp_path: Path) -> None:
    others = floats("float")
    scale = others[ROUTER].abs().amax(-1, keepdim=True) / 127
    others[ROUTER] = (others[ROUTER] / scale).round() * scale
    (wrong,) = judge(tmp_path, "float", others=others).check.wrong
    assert (wrong.tensor, wrong.row, wrong.count, wrong.num_rows) == ("layer 0, router", 0, EXPERTS, EXPERTS)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_floats_stored_in_16_bits_are_the_twin_s_rounded(tmp_path: Path, kind: int) -> None:
    """And 2 % is told from that rounding."""
    for factor, num_wrong in ((1.0, 0), (1.02, WIDTH)):
        folder = tmp_path / str(factor)
        folder.mkdir()
        b, query = Builder(), value(draw("float"), QUERY, "float")
        b.tensors.append(helper.make_tensor("weight", kind, [WIDTH, WIDTH], (query.T * factor).flatten().tolist()))
        b.node("MatMul", ["x", "weight"])
        constants = read_constants(b.save(folder / "package"))
        (matrix,) = constants.matrices
        assert matrix.narrow == {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}[kind]
        twin = folder / "twin"
        twin.mkdir()
        save_file({QUERY: query}, twin / "model.safetensors", {"format": "pt"})
        MixtralConfig(hidden_size=WIDTH, num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(twin)
        assert check_weights(constants, twin).check.num_wrong == num_wrong


@pytest.mark.parametrize("form", get_args(Form))
def test_two_columns_exchanged_make_other_rows(tmp_path: Path, form: Form) -> None:
    """A row has the same numbers then, and is as long; whichever two they are."""

    def exchanged(first: int, second: int) -> Plant:
        def plant(tensors: Tensors) -> Tensors:
            codes = unpack(tensors[QUERY].codes.flatten(1), bits_of(form))
            order = list(range(WIDTH))
            order[first], order[second] = second, first
            codes = codes[:, order]
            packed = codes if form != "int4" else codes[:, 0::2] | codes[:, 1::2] << 4
            return {**tensors, QUERY: replace(tensors[QUERY], codes=packed.view(tensors[QUERY].codes.shape))}

        return plant

    for number in range(1, 6):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = judge(folder, form, exchanged(0, number)).check
        assert found.wrong[0].tensor == "layer 0, attention's q_proj"
        assert found.num_wrong > 0.8 * WIDTH  # of some rows both numbers are the same


def test_rows_that_are_no_numbers_or_huge_ones_are_like_no_other() -> None:
    """And numpy warns of nothing, which would be printed before what parity says."""
    true = np.ones(4, np.float32)
    rows = [np.full(4, value, np.float32) for value in (np.nan, np.inf, 3e38, 1.01)]
    assert find_nearest(true, rows) == 3
