"""How onnxruntime rounds inputs of quantized products here, found by experiment.

The experiments are products of known numbers. `accuracy_level` allows an operator to round its inputs to 8 bits;
whether it does, and in groups of how many, is the kernel's choice, and another processor has other kernels. So before
anything is compared, each kind of product in the package is computed once for numbers that tell: in a graph of its own,
for one row and for many, against float64 products of inputs that are rounded in every way that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

from dense2moe.export.nodes.writer import IR_VERSION, MICROSOFT
from dense2moe.export.parity.weights.matrix import INT8, Operator
from dense2moe.export.quantization.blockwise import Quantized, dequantize, quantize
from dense2moe.export.quantization.input_scaling import round_inputs

_SAME = 2e-5
"""Relative error of a product's outputs.

Float32 sums of a few hundred products differ by less, another rounding by a hundred times more.
"""
_ROWS = (1, 33)
_REFUSALS = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)
_OPSET = 21
RoundingFunction = Callable[[torch.Tensor], torch.Tensor]


def find_group(operator: Operator, provider: str) -> int | None:
    """How many input elements share one 8-bit scale.

    0 where inputs are not rounded, None where no known rounding fits.
    Raises nothing: a kind of product that cannot be computed alone here is one whose rounding is not known.
    """
    return _find(operator, provider)


@cache
def _find(operator: Operator, provider: str) -> int | None:
    if not operator.rounds_inputs:
        return 0
    try:
        fitting = [set(_fitting(operator, provider, rows)) for rows in _ROWS]
    except _REFUSALS:
        return None
    return next(iter(sorted(set.intersection(*fitting), reverse=True)), None)


def _fitting(operator: Operator, provider: str, num_rows: int) -> Iterator[int]:
    """Group sizes that explain the operator's result for some rows.

    Size 0 means that inputs are not rounded.
    """
    block, width, height = operator.block_size, 2 * operator.block_size, 16
    generator = torch.Generator().manual_seed(operator.block_size)
    # Sizes that grow along a row tell groups apart.
    x = torch.randn(num_rows, width, generator=generator) * torch.linspace(0.1, 5, width)
    if operator.op == "QMoE":
        first, last = (
            quantize(
                torch.randn(*shape, generator=generator),
                operator.bits,
                block,
                None,
                torch.float32,
                operator.zero_points,
            )
            for shape in ((2 * width, width), (width, width))
        )
        found = _run(
            _experts(operator, first, last, width),
            {"x": x.numpy(), "logits": np.zeros((num_rows, 1), np.float32)},
            provider,
        )
        both = [dequantize(part, width, operator.bits).double() for part in (first, last)]
        for group in (0, *sorted({block, 16, 32, 64, 128, width})):
            rounded = _round(x, group).double() @ both[0].T
            inner = torch.nn.functional.silu(rounded[:, 0::2]) * rounded[:, 1::2]
            if _is_same(found, _round(inner.float(), group).double() @ both[1].T):
                yield group
        return
    weight = quantize(
        torch.randn(height, width, generator=generator), operator.bits, block, None, torch.float32, operator.zero_points
    )
    found = _run(_product(operator, weight, width, height), {"x": x.numpy()}, provider)
    matrix = dequantize(weight, width, operator.bits).double()
    for group in (0, *sorted({block, 16, 32, 64, 128, width})):
        if _is_same(found, _round(x, group).double() @ matrix.T):
            yield group


def _round(x: torch.Tensor, group: int) -> torch.Tensor:
    return round_inputs(x, group) if group else x


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether most rows are equal; a tie may round either way."""
    errors = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool(errors.median() <= _SAME)


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], provider: str) -> torch.Tensor:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not torch.cpu._is_vnni_supported():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    return torch.from_numpy(session.run(["y"], feeds)[0])


def _product(operator: Operator, weight: Quantized, width: int, height: int) -> onnx.ModelProto:
    given = {"codes": weight.codes.numpy(), "scales": weight.scales.numpy().reshape(-1)}
    if weight.zero_points is not None:
        given["zeros"] = weight.zero_points.numpy().reshape(-1)
    attributes: dict[str, Any] = {
        "K": width,
        "N": height,
        "bits": operator.bits,
        "block_size": operator.block_size,
        "accuracy_level": INT8,
    }
    return _model(
        helper.make_node("MatMulNBits", ["x", *given], ["y"], domain=MICROSOFT, **attributes),
        given,
        {"x": ["rows", width]},
    )


def _experts(operator: Operator, first: Quantized, last: Quantized, width: int) -> onnx.ModelProto:
    given: dict[str, np.ndarray] = {}
    for name, part in (("fc1", first), ("fc2", last)):
        given |= {f"{name}.codes": part.codes.flatten(1)[None].numpy(), f"{name}.scales": part.scales[None].numpy()}
        if part.zero_points is not None:
            given[f"{name}.zeros"] = part.zero_points[None].numpy()
    inputs = ["x", "logits", "fc1.codes", "fc1.scales", "", "fc2.codes", "fc2.scales"]
    if operator.zero_points:
        inputs += ["", "", "", "", "fc1.zeros", "fc2.zeros"]
    attributes: dict[str, Any] = {
        "k": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
        "expert_weight_bits": operator.bits,
        "block_size": operator.block_size,
    }
    if operator.bits == 4:
        attributes["accuracy_level"] = INT8
    return _model(
        helper.make_node("QMoE", inputs, ["y"], domain=MICROSOFT, **attributes),
        given,
        {"x": ["rows", width], "logits": ["rows", 1]},
    )


def _model(node: onnx.NodeProto, given: dict[str, np.ndarray], inputs: dict[str, list[str | int]]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in given.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
