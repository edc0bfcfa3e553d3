"""A graph under construction: nodes with names, weights read when saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from dense2moe.export.storage import CONTENT
from dense2moe.export.variant import ElementType, scale_type

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10

Array = npt.NDArray[Any]


_DATA_TYPES: dict[ElementType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
}


class GraphWriter:
    """Collects nodes and initializers of one graph.

    Values are `onnx_ir` values; every one has a name that says what it is. The element type is that of products,
    attention and KV cache. The residual stream, norms, routers and logits are float32 in every graph: `narrow` takes a
    value from there into the element type, `widen` takes it back, and in a float32 graph both do nothing.

    Float weights are of the float type, which is the element type, but for bfloat16 weights in a float32 graph.
    onnxruntime's CPU moves bfloat16, and computes nothing in it (`MatMul` has no such kernel in 1.32). It folds the
    casts of weights as it loads, so the file has half the bytes, and what runs is the float32 graph: of 117 M
    parameters 766 MB in memory where the float32 file takes 691, the operator's weights mapped from it, and 806 where
    it takes 754, with a product an expert. On CUDA the operators of a bfloat16 graph all take it, by onnxruntime's own
    tables (docs/OperatorKernels.md, docs/BFloat16_Support.md); no device was at hand.
    """

    def __init__(
        self,
        element_type: ElementType = "float32",
        float_type: ElementType | None = None,
        outer: GraphWriter | None = None,
        prefix: str = "",
    ) -> None:
        self.element_type, self.float_type = element_type, float_type or element_type
        self._outer, self._prefix = outer, prefix
        self.dtype = _DATA_TYPES[element_type]
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._shared: dict[tuple[str, str], ir.Value] = {}
        self._stream = ""
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def branch(self, prefix: str) -> GraphWriter:
        """A writer for a subgraph, whose values begin with `prefix`.

        It may read all values written here so far. Its weights are its own, and small constants are this graph's.
        """
        return GraphWriter(self.element_type, self.float_type, self, prefix)

    def close(self, output: ir.Value, name: str) -> ir.Graph:
        """The subgraph called `name` that was written, with its output in float32."""
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return ir.Graph([], [output], nodes=self.nodes, initializers=list(self.initializers.values()), name=name)

    def narrow(self, x: ir.Value, name: str | None = None) -> ir.Value:
        """The float32 value x cast, once only, to the graph's element type."""
        return self._cast(x, self.dtype, name)

    def widen(self, x: ir.Value, name: str | None = None) -> ir.Value:
        """The value x cast, once only, from the element type to float32."""
        return self._cast(x, ir.DataType.FLOAT, name)

    def _cast(self, x: ir.Value, to: ir.DataType, name: str | None) -> ir.Value:
        if self.element_type == "float32":
            return x
        if (x, to) not in self._casts:
            self._casts[x, to] = self.op("Cast", [x], name or f"{x.name}_{str(to).lower()}", {"to": int(to)})
        return self._casts[x, to]

    def number(self, value: float) -> Array:
        """A scalar in the graph's element type."""
        return np.array(value, self.dtype.numpy())

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Append a node with one output called `name`."""
        return self.op_multi(op_type, inputs, [name], attributes, domain)[0]

    def op_multi(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs; an empty name is unused."""
        outputs = [ir.Value(name=f"{self._prefix}{name}" if name else "") for name in names]
        attrs = [ir.Attr(key, _attribute_type(value), value) for key, value in (attributes or {}).items()]
        shown = next(value.name for value in outputs if value.name)
        self.nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=f"{shown}/{op_type}"))
        return outputs

    def take_nodes(self) -> list[ir.Node]:
        """Take the nodes written so far out of this writer."""
        taken, self.nodes = self.nodes, []
        return taken

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small initializer, made once for each name and stream."""
        if self._outer is not None:
            return self._outer.constant(name, value)
        name = f"{self._stream}{name}"
        if name not in self.initializers:
            self.initializers[name] = _initializer(name, ir.tensor(value, name=name), value.shape)
        return self.initializers[name]

    def enter_stream(self, name: str) -> None:
        """From here on layers read another stream of tokens.

        Such as the second tower of CLIP. They share no value with the layers before, and `name` begins what they share.
        """
        self._stream = name

    def shared(self, name: str, write: Callable[[], ir.Value]) -> ir.Value:
        """A value of all layers of a stream, written when asked for."""
        key, prefix = (self._stream, name), self._prefix
        if key not in self._shared:
            self._prefix += self._stream
            self._shared[key] = write()
            self._prefix = prefix
        return self._shared[key]

    def float_weight(self, name: str, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> ir.Value:
        """A large float initializer, cast to the element type; see `weight`."""
        stored = self.stored_weight(name, shape, read)
        if self.float_type == self.element_type:
            return stored
        return self.op("Cast", [stored], f"{name}.widened", {"to": int(self.dtype)})

    def stored_weight(self, name: str, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> ir.Value:
        """A large float initializer in its stored type; see `weight`."""
        return self.weight(name, _DATA_TYPES[self.float_type], shape, read)

    def scales(
        self,
        name: str,
        shape: Sequence[int],
        read: Callable[[], torch.Tensor],
        dtype: ir.DataType,
        content: str | None = None,
    ) -> ir.Value:
        """Scales of integers, as a value of `dtype`; see `weight`.

        They lie in the file in the 16 bits that they were rounded to.

        Raises, when the file is written:
            ValueError: they are not of 16 bits.
        """
        narrow = _DATA_TYPES[scale_type(self.element_type)]

        def load() -> torch.Tensor:
            scales = read()
            rounded = scales.to(_TORCH_TYPES[narrow])
            if not torch.equal(rounded.to(scales.dtype), scales):
                raise ValueError(
                    f"scales {name}: not of the 16 bits of {narrow.name.lower()}, which they must be rounded to "
                    "before integers are chosen"
                )
            return rounded

        stored = self.weight(name, narrow, shape, load, content)
        return stored if stored.dtype == dtype else self.op("Cast", [stored], f"{name}.widened", {"to": int(dtype)})

    def weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        read: Callable[[], torch.Tensor],
        content: str | None = None,
    ) -> ir.Value:
        """A large initializer, read by `read` when the file is written.

        Its tensor is dropped right after. It is cast to `dtype`. `content` tells what it holds: weights with the same
        bytes of the same content lie in the file once.
        """
        name = f"{self._prefix}{name}"

        def load() -> ir.TensorProtocol:
            tensor = read().to(_TORCH_TYPES[dtype]).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"weight {name}: planned shape {tuple(shape)}, was given {tuple(tensor.shape)}")
            if dtype == ir.DataType.BFLOAT16:  # numpy has no such type of its own
                return ir.tensor(tensor.view(torch.uint16).numpy().view(dtype.numpy()), dtype=dtype, name=name)
            return ir.tensor(tensor.numpy(), dtype=dtype, name=name)

        if name in self.initializers:
            raise ValueError(f"weight {name} is written twice")
        lazy = ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.initializers[name] = _initializer(name, lazy, shape)
        if content is not None:
            self.initializers[name].meta[CONTENT] = content
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
        case ir.Graph():
            return ir.AttributeType.GRAPH
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
