"""Our runtime for packages without a cache: one pass gives everything.

Encoders of text, images and sound. Inputs are given by name, as transformers' models take them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import onnxruntime_errors, open_package, read_config
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.runtime.inspection import NOTHING, Inspection, let_routers_be_nudged
from dense2moe.export.runtime.session import make_options, read_metadata, start_session
from dense2moe.export.storage import MODEL_NAME

Tensors = Mapping[str, torch.Tensor]
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class SinglePass:
    """A package that gives all its outputs in one pass.

    `inputs` and `outputs` are the names that the package has; what `inspection` says is given too.
    """

    def __init__(
        self,
        directory: Path,
        provider: str = CPU,
        inspection: Inspection = NOTHING,
        num_threads: int = 0,
        profile: Path | None = None,
        name: str = MODEL_NAME,
    ) -> None:
        """Load the package in `directory`.

        Of several graphs the one in the file `name`. `profile` is where onnxruntime's profile of it begins its name.

        Raises:
            ExportError: no package there, a damaged one, one with a cache, a runtime older than it needs, or a provider
                that is not to be had.
        """
        package = open_package(directory, name)
        self.path, model = package.path, package.model
        self.metadata = read_metadata(package, provider)
        self.outputs = [value.name for value in model.graph.output]
        self.taps = list(dict.fromkeys([*inspection.find_taps(model), *inspection.values]))
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.taps)
        let_routers_be_nudged(model, inspection.routers)
        self.session = start_session(package, make_options(num_threads, profile), provider)
        config = read_config(directory)
        self._vocab_size = config.size("vocab_size", default=2)
        self.context_length = config.size("max_position_embeddings", default=sys.maxsize)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        unknown = sorted({value.type for value in self._inputs.values()} - set(_TYPES))
        if unknown:
            raise ExportError(f"{self.path}: has an input of {unknown[0]}; must be {' or '.join(_TYPES)}; export it so")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it reads."""
        return tuple(self._inputs)

    def draw_inputs(self, batch_size: int, length: int | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Inputs for a batch: drawn tokens, or noise.

        Every token is real.
        `length`: tokens or samples of a row, where the graph leaves them open.

        Raises:
            ExportError: it leaves them open, and no length is given.
        """
        return {
            name: _draw(name, self._measure(value, batch_size, length), value.type, self._vocab_size, generator)
            for name, value in self._inputs.items()
        }

    @property
    def is_open(self) -> bool:
        """Whether rows may have any length."""
        return any(not isinstance(size, int) for value in self._inputs.values() for size in value.shape[1:])

    def _measure(self, value: ort.NodeArg, batch_size: int, length: int | None) -> list[int]:
        sizes = [batch_size, *(size if isinstance(size, int) else length for size in value.shape[1:])]
        if None in sizes:
            raise ExportError(f"{self.path}: rows of {value.name} may have any length; give one")
        return [int(size) for size in sizes if size is not None]

    def run(self, given: Tensors) -> dict[str, torch.Tensor]:
        """All outputs and taps by name, for inputs by name.

        Inputs that it has not are not read.

        Raises:
            ExportError: an input is missing, or onnxruntime refuses their values.
        """
        missing = sorted(set(self._inputs) - set(given))
        if missing:
            raise ExportError(f"{self.path}: reads {', '.join(self._inputs)}; {missing[0]} was not given")
        feeds = {name: given[name].numpy().astype(_TYPES[value.type]) for name, value in self._inputs.items()}
        with onnxruntime_errors(self.path, "run"):
            found = self.session.run([*self.outputs, *self.taps], feeds)
        return {name: torch.from_numpy(value) for name, value in zip([*self.outputs, *self.taps], found, strict=True)}


def _draw(name: str, shape: list[int], kind: str, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """An input's values: tokens, a mask of ones, zeros, noise."""
    if name == names.INPUT_IDS:
        return torch.randint(vocab_size, shape, generator=generator)
    if name == names.ATTENTION_MASK:
        return torch.ones(shape, dtype=torch.int64)
    return torch.zeros(shape, dtype=torch.int64) if "int" in kind else torch.randn(shape, generator=generator)
