"""The graph's arithmetic: how each product rounds, by file and experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch

from dense2moe.export.names import is_past
from dense2moe.export.opening import open_package
from dense2moe.export.parity.inside.flips import Round
from dense2moe.export.parity.inside.probe import find_group
from dense2moe.export.parity.inside.products import Arithmetic, Narrowing
from dense2moe.export.parity.weights.matrix import GraphMatrix, Operator
from dense2moe.export.parity.weights.rows import FoundWeights
from dense2moe.export.quantization.simulation import BlockRounding
from dense2moe.upcycle.errors import shorten

_NARROW = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}


def find_arithmetic(package: Path, found: FoundWeights, provider: str) -> Arithmetic:
    """The rounding of each product, by the twin's tensors in it."""
    narrow = find_narrow(package)
    rounds: dict[str, Round] = {}
    unknown: list[str] = []
    for tensor, matrices in found.operators.items():
        product = next((matrix for matrix in matrices if matrix.use in ("product", "experts")), None)
        if product is None or (
            product.operator.op in ("MatMul", "Gemm", "FusedMatMul") and product.narrow is None and narrow is None
        ):
            continue
        rounding = _find_rounding(product, provider, narrow)
        if rounding is None and product.operator.rounds_inputs:
            unknown.append(_describe(product.operator))
        if rounding is not None:
            rounds[tensor] = rounding
    if found.rounded:
        more = f" and {len(found.rounded) - 1} more values" if len(found.rounded) > 1 else ""
        unknown.append(f"'{shorten(found.rounded[0])}'{more}, which no product by weights reads")
    return Arithmetic(rounds, narrow, tuple(dict.fromkeys(unknown)))


def find_narrow(package: Path) -> torch.dtype | None:
    """The 16-bit type of a graph's attention and cache; None in float32."""
    model = open_package(package).model
    types = {value.type.tensor_type.elem_type for value in model.graph.input if is_past(value.name)}
    return next((_NARROW[kind] for kind in types if kind in _NARROW), None)


def _find_rounding(
    matrix: GraphMatrix, provider: str, narrow: torch.dtype | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if matrix.input_rounding is not None:
        return matrix.input_rounding
    if matrix.operator.rounds_inputs:
        group = find_group(matrix.operator, provider)
        if group is None:
            return None
        if group:
            factors = None if matrix.input_factors is None else 1 / torch.from_numpy(matrix.input_factors())
            return BlockRounding(group, factors)
    return None if narrow is None else Narrowing(narrow)


def _describe(operator: Operator) -> str:
    return f"{operator.op} with {operator.bits}-bit weights in blocks of {operator.block_size}"
