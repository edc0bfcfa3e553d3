"""Values of a graph's constants, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import NodeProto, TensorProto

from dense2moe.export.opening import OpenedPackage
from dense2moe.export.parity.weights.matrix import FloatArray, Operator
from dense2moe.export.quantization.blockwise import Quantized, dequantize, num_blocks, zero_point_bytes

_VIEWS = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten")
_KEPT = 3  # codes, scales and zero points
NARROW = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}


class Values:
    """Nodes, constants and values made of constants, by name.

    All belong to one graph.
    """

    def __init__(self, graph: onnx.GraphProto, package: OpenedPackage) -> None:
        self.nodes = list(graph.node)
        self.package = package
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.tensors.update(
                    (node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value"
                )
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.last: dict[str, npt.NDArray[Any]] = {}

    def dequantize(
        self, names: tuple[str, str, str], operator: Operator, shape: tuple[int, int], expert: int | None = None
    ) -> FloatArray:
        """Float rows from integers, scales and zero points.

        Where experts are stacked, the rows of one expert.
        """
        codes, scales, zeros = names
        (rows, width), bits, block = shape, operator.bits, operator.block_size
        blocks = num_blocks(width, block)

        def tensor(name: str) -> torch.Tensor:
            whole = self._resolve(name)
            return torch.from_numpy(np.array(whole if expert is None else whole[expert]))

        packed = tensor(codes)
        packed = (
            _pack_again(packed, bits)
            if self.tensors[codes].data_type not in (TensorProto.UINT8, TensorProto.INT8)
            else packed.view(torch.uint8)
        )
        packed = packed.reshape(rows, -1)
        short = blocks * block * bits // 8 - packed.shape[1]  # a table's last block is as wide as the row leaves it
        packed = torch.nn.functional.pad(packed, (0, short)) if short > 0 else packed
        own = tensor(scales).to(torch.float32).reshape(rows, blocks)
        points = None
        if zeros:
            found = tensor(zeros)
            if found.is_floating_point():
                codes_only = dequantize(
                    Quantized(packed.reshape(rows, blocks, -1), torch.ones_like(own)), blocks * block, bits
                )
                middle = float(1 << (bits - 1))
                shifted = (
                    codes_only.reshape(rows, blocks, block) + middle - found.reshape(rows, blocks, 1).to(torch.float32)
                )
                return (shifted * own[..., None]).reshape(rows, -1)[:, :width].numpy()
            points = found.view(torch.uint8).reshape(rows, -1)[:, : zero_point_bytes(width, bits, block)]
        return dequantize(Quantized(packed.reshape(rows, blocks, -1), own, points), width, bits).numpy()

    def find(self, name: str) -> tuple[Callable[[], FloatArray], tuple[int, ...], torch.dtype | None] | None:
        """A constant value's reader, shape, and 16-bit type.

        None if it is not such a one.
        """
        chain = self.chain(name)
        if chain is None:
            return None
        tensor = self.tensors[chain[-1]]
        shape = tuple(tensor.dims)
        for node_name in reversed(chain[:-1]):
            node = self.makers[node_name]
            if node.op_type == "Transpose":
                order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(len(shape)))[::-1])
                shape = tuple(shape[place] for place in order)
            elif node.op_type in _VIEWS:
                shape = self._resolve(node_name).shape
        return lambda: self._resolve(name).astype(np.float32), shape, NARROW.get(tensor.data_type)

    def chain(self, name: str) -> list[str] | None:
        """A value and everything it is made from, down to the constant."""
        chain = [name]
        while chain[-1] not in self.tensors:
            node = self.makers.get(chain[-1])
            if node is None or node.op_type not in (*_VIEWS, "Cast", "Transpose", "DequantizeLinear"):
                return None
            chain.append(node.input[0])
        return chain

    def source(self, name: str) -> TensorProto:
        """The constant that a value is made from."""
        chain = self.chain(name)
        assert chain is not None
        found: TensorProto = self.tensors[chain[-1]]
        return found

    def _resolve(self, name: str) -> npt.NDArray[Any]:
        """A value made from constants alone, as numbers."""
        if name in self.tensors:
            return self.array(name)
        node = self.makers[name]
        inner = self._resolve(node.input[0])
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        match node.op_type:
            case "Transpose":
                return np.transpose(inner, settings.get("perm"))
            case "Cast":
                kind = settings["to"]
                return inner.astype(
                    np.float32 if kind == TensorProto.BFLOAT16 else onnx.helper.tensor_dtype_to_np_dtype(kind)
                )
            case "Reshape":
                return inner.reshape(
                    [size or inner.shape[n] for n, size in enumerate(self.array(node.input[1]).tolist())]
                )
            case "DequantizeLinear":
                return self._dequantize_linear(node, inner, settings)
            case "Identity":
                return inner
            case _:
                return inner.reshape([size for size in inner.shape if size != 1])

    def _dequantize_linear(
        self, node: NodeProto, codes: npt.NDArray[Any], settings: dict[str, Any]
    ) -> npt.NDArray[Any]:
        axis, block = settings.get("axis", 1), settings.get("block_size", 0)
        scales = self._resolve(node.input[1]).astype(np.float32)
        zeros = (
            self._resolve(node.input[2]).astype(np.float32)
            if len(node.input) > 2 and node.input[2]
            else np.zeros_like(scales)
        )
        if block:
            scales, zeros = (
                np.repeat(each, block, axis=axis).take(range(codes.shape[axis]), axis=axis) for each in (scales, zeros)
            )
        elif scales.size > 1:
            form = [1] * codes.ndim
            form[axis] = -1
            scales, zeros = scales.reshape(form), zeros.reshape(form)
        found: npt.NDArray[Any] = (codes.astype(np.float32) - zeros) * scales
        return found

    def array(self, name: str) -> npt.NDArray[Any]:
        """A constant as numbers; the last few are cached for stacked experts."""
        if name not in self.last:
            while len(self.last) >= _KEPT:
                del self.last[next(iter(self.last))]
            self.last[name] = self._load(name)
        return self.last[name]

    def _load(self, name: str) -> npt.NDArray[Any]:
        tensor = self.tensors[name]
        array = self.package.read_tensor(tensor)
        return array.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else array


def _pack_again(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers, one an element, packed again as codes."""
    whole = codes.to(torch.int16)
    unsigned = (whole + (1 << (bits - 1)) if int(whole.min()) < 0 else whole).to(torch.uint8)
    return unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
