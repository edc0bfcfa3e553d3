"""Static 8-bit activations in torch: products read their inputs rounded, as those of the graph do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from export.parameters import locate_parameters
from export.twin import QuantizedWeight, Twin

_LOWEST, _HIGHEST = -128, 127


class RoundedInputs(TorchFunctionMode):
    """While it is entered, a twin's model, loaded with eager experts, computes what its static 8-bit graph does.

    The checkpoint holds the weights that the integers stand for; what it cannot hold is that inputs are rounded to 8 bits, with the scales that were
    measured. So every `linear` by a weight that has such a scale rounds its input first. Weights are told by their addresses, an expert's being that
    of its first row.
    """

    def __init__(self, model: PreTrainedModel, twin: Twin) -> None:
        super().__init__()
        self.scales: dict[int, float] = {}
        located = locate_parameters(model, {name: entry.shape for name, entry in twin.checkpoint.entries.items()})
        for name, parameter in model.state_dict(keep_vars=True).items():
            if parameter.ndim < 2 or not parameter.numel():
                continue
            matrices = parameter.detach().view(-1, *parameter.shape[-2:])
            for number, matrix in enumerate(matrices):
                row = number * matrix.shape[0]
                for piece in located[name]:
                    if 0 <= row < piece.stop - piece.start:
                        weight = twin.weight(piece.name, (piece.start + row, piece.stop))
                        if isinstance(weight, QuantizedWeight) and piece.name in twin.scheme["input_scales"]:
                            self.scales[matrix.data_ptr()] = weight.input_scale
                    row -= piece.stop - piece.start

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; `linear` with its input rounded, where that has a scale."""
        if func is F.linear and args[1].data_ptr() in self.scales:
            scale = self.scales[args[1].data_ptr()]
            rounded = (args[0] / scale).round().clamp(_LOWEST, _HIGHEST) * scale  # as QuantizeLinear divides and rounds
            args = (rounded, *args[1:])
        return func(*args, **(kwargs or {}))
