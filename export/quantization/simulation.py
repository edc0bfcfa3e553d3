"""8-bit activations in torch: products round inputs as the graph does.

With static scales the checkpoint cannot hold that inputs are rounded, so a twin's model rounds them always. The
operators that find their scales as they run (`MatMulNBits` at accuracy_level 4, `QMoE`) round by each block of a token;
parity finds out which do (`dense2moe.export.parity.inside.probe`), and has their twin round the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dense2moe.export.quantization.input_scaling import round_inputs
from dense2moe.export.quantization.parameters import locate_parameters
from dense2moe.export.quantization.twin import QuantizedWeight, Twin

_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class StaticRounding:
    """Inputs rounded to 8-bit integers times one stored scale.

    `lowest` and `highest` are the ends of the integers, counted from the zero point.
    """

    scale: float
    lowest: int = _LOWEST
    highest: int = _HIGHEST

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rounded inputs, as QuantizeLinear computes them."""
        return (x / self.scale).round().clamp(self.lowest, self.highest) * self.scale

    def in_steps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, K] in steps, not rounded yet, and each step's size."""
        return x / self.scale, torch.full_like(x, self.scale)


@dataclass(frozen=True, eq=False)  # tensors are compared element by element
class BlockRounding:
    """Inputs rounded by block of each token.

    Divided by the scales [K] of their columns before.

    Where they have some.
    """

    block_size: int
    column_scales: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rounded inputs."""
        if self.column_scales is None:
            return round_inputs(x, self.block_size)
        return round_inputs(x / self.column_scales, self.block_size) * self.column_scales

    @property
    def lowest(self) -> int:
        """The least integer."""
        return -_HIGHEST

    @property
    def highest(self) -> int:
        """The largest integer."""
        return _HIGHEST

    def in_steps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, K] in steps, not rounded yet, and each step's size."""
        factors = torch.ones(x.shape[-1]) if self.column_scales is None else self.column_scales
        padded = F.pad(x / factors, (0, -x.shape[-1] % self.block_size)).view(len(x), -1, self.block_size)
        step = padded.abs().amax(-1, keepdim=True) / _HIGHEST
        numbers = torch.where(step > 0, padded / step, 0.0).flatten(1)
        return numbers[:, : x.shape[-1]], step.expand_as(padded).flatten(1)[:, : x.shape[-1]] * factors


EightBits: TypeAlias = StaticRounding | BlockRounding
"""Every way in which a product's inputs are rounded to 8 bits."""


class RoundedInputs(TorchFunctionMode):
    """Context manager: a twin's model rounds its products' inputs.

    The model is loaded with eager experts. Reads the inputs of quantized products as its 8-bit graph does. Weights are
    told by their addresses, an expert's being that of its first row; so every `linear` by a quantized weight rounds its
    input first.
    """

    def __init__(self, model: PreTrainedModel, twin: Twin) -> None:
        super().__init__()
        self.rounds: dict[int, EightBits] = {}
        located = locate_parameters(model, {name: entry.shape for name, entry in twin.checkpoint.entries.items()})
        for name, parameter in model.state_dict(keep_vars=True).items():
            if parameter.ndim < 2 or not parameter.numel():
                continue
            matrices = parameter.detach().view(-1, *parameter.shape[-2:])
            for number, matrix in enumerate(matrices):
                row = number * matrix.shape[0]
                for piece in located.get(name, ()):
                    if 0 <= row < piece.stop - piece.start:
                        weight = twin.weight(piece.name, (piece.start + row, piece.stop))
                        if isinstance(weight, QuantizedWeight) and (
                            not weight.is_static or piece.name in twin.scheme["input_scales"]
                        ):
                            self.rounds[matrix.data_ptr()] = _rounding(weight)
                    row -= piece.stop - piece.start

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; `linear` rounds a quantized weight's input."""
        if func is F.linear and args[1].data_ptr() in self.rounds:
            args = (self.rounds[args[1].data_ptr()](args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _rounding(weight: QuantizedWeight) -> EightBits:
    """How a product by this weight rounds its input."""
    return (
        StaticRounding(weight.input_scale)
        if weight.is_static
        else BlockRounding(weight.block_size, weight.read_column_scales())
    )
