"""A graph under construction: named nodes, and weights that stay on disk until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10

Array = npt.NDArray[Any]


class GraphWriter:
    """Collects nodes and initializers of one graph. Values are `onnx_ir` values; every one has a name that says what it is."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, Any] | None = None, domain: str = ""
    ) -> ir.Value:
        """Append a node with one output called `name`."""
        return self.op_multi(op_type, inputs, [name], attributes, domain)[0]

    def op_multi(
        self, op_type: str, inputs: Sequence[ir.Value | None], names: Sequence[str], attributes: Mapping[str, Any] | None = None, domain: str = ""
    ) -> Sequence[ir.Value]:
        """Append a node with outputs called `names`; an empty name is an output that nobody reads."""
        outputs = [ir.Value(name=name) for name in names]
        attrs = [ir.Attr(key, _attribute_type(value), value) for key, value in (attributes or {}).items()]
        shown = next(name for name in names if name)
        self.nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=f"{shown}/{op_type}"))
        return outputs

    def take_nodes(self) -> list[ir.Node]:
        """The nodes written so far, which are no longer this writer's."""
        taken, self.nodes = self.nodes, []
        return taken

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small initializer; asked for again by the same name, it is the same one."""
        if name not in self.initializers:
            self.initializers[name] = _initializer(name, ir.tensor(value, name=name), value.shape)
        return self.initializers[name]

    def weight(self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> ir.Value:
        """A large initializer: `read` is called when the file is written, and its tensor is dropped right after."""

        def load() -> ir.TensorProtocol:
            tensor = read().contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"weight {name}: planned shape {tuple(shape)}, was given {tuple(tensor.shape)}")
            return ir.tensor(tensor.numpy(), dtype=dtype, name=name)

        if name in self.initializers:
            raise ValueError(f"weight {name} is written twice")
        lazy = ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.initializers[name] = _initializer(name, lazy, shape)
        return self.initializers[name]


def _initializer(name: str, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)


def _attribute_type(value: Any) -> ir.AttributeType:
    match value:
        case bool() | int():
            return ir.AttributeType.INT
        case float():
            return ir.AttributeType.FLOAT
        case str():
            return ir.AttributeType.STRING
        case [int(), *_]:
            return ir.AttributeType.INTS
        case _:
            raise TypeError(f"no ONNX attribute type for {value!r}")


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A graph input or output with symbolic dimensions where `shape` has names."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def int64(*values: int) -> Array:
    """An int64 array of one dimension."""
    return np.array(values, dtype=np.int64)
