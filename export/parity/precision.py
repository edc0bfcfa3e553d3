"""The precision of a graph, read from its weights and operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from dense2moe.export.graph.branches import take_branches
from dense2moe.export.names import is_router_logits
from dense2moe.export.opening import open_graphs
from dense2moe.export.variant import STATIC, Variant
from dense2moe.upcycle.models.table import EXPERT_COUNTS

_BITS = {"MatMulNBits": "bits", "QMoE": "expert_weight_bits"}
_DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger")
_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_ACCURACY_INT8 = 4  # `accuracy_level` of MatMulNBits and QMoE: activations in 8 bits


@dataclass(frozen=True)
class Precision:
    """A package's variant, and whether it rounds to 16 or 8 bits.

    `has_experts`: operators or names in the graph show that tokens go to experts.
    """

    variant: Variant
    rounds_activations: bool
    has_experts: bool = False

    @property
    def rounds_weights(self) -> bool:
        """Whether weights differ from the checkpoint's by more than float16 rounding."""
        return self.variant not in ("float32", "float16")


def find_precision(directory: Path) -> Precision:
    """Read the precision from the graph; the smallest bits count.

    The variant is named by the fewest bits of any product's weights.

    Raises:
        ExportError: no package there, or a damaged one.
    """
    models = [package.model for package in open_graphs(directory)]
    experts = any(map(has_experts, models))
    branches = [each.graph for model in models for each in take_branches(model)]
    attributes = [(node.op_type, {a.name: a.i for a in node.attribute}) for branch in branches for node in branch.node]
    bits = [found.get(_BITS[op], 4) for op, found in attributes if op in _BITS]
    dynamic = any(op in _DYNAMIC for op, _ in attributes)
    static = any(op == "QuantizeLinear" for op, _ in attributes)
    rounded = any(op in _BITS and found.get("accuracy_level") == _ACCURACY_INT8 for op, found in attributes)
    # the CPU's kernel reads 8 bits
    rounded |= any(op == "QMoE" and found.get("expert_weight_bits", 4) == 8 for op, found in attributes)
    # the cache is of the type that attention computes in
    inputs = [value for model in models for value in model.graph.input]
    narrow = any(value.type.tensor_type.elem_type in _NARROW for value in inputs)
    if bits or dynamic or static:
        variant: Variant = "int4" if min(bits, default=8) < 8 else STATIC if static else "int8"
        return Precision(variant, dynamic or static or rounded or narrow, experts)
    stored = {tensor.data_type for branch in branches for tensor in branch.initializer}
    if onnx.TensorProto.BFLOAT16 in stored:
        return Precision("bfloat16", narrow, experts)
    if narrow or onnx.TensorProto.FLOAT16 in stored:
        return Precision("float16", True, experts)
    return Precision("float32", False, experts)


def has_experts(model: onnx.ModelProto) -> bool:
    """Whether tokens go to experts, by operators and our own names."""
    return any(node.op_type in ("MoE", "QMoE") or any(map(is_router_logits, node.output)) for node in model.graph.node)


def is_dense(config: Any) -> bool:
    """Whether a checkpoint's config has no experts."""
    return not any(getattr(config, name, None) for name in EXPERT_COUNTS)
