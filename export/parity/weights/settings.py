"""Numbers of a graph that stand beside its weights, against the twin's.

What a norm adds to the mean of squares, and the scales by which a graph rounds what its products read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from dense2moe.export.coverage import find_decoder_family, find_refusal
from dense2moe.export.parity.records import WrongRows
from dense2moe.export.parity.weights.differences import name_tensor
from dense2moe.export.parity.weights.matrix import Constants, FloatArray, GraphMatrix
from dense2moe.export.quantization.twin import SCHEME_NAME, Twin
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.models.parts import CLASS_OF_PART

_SAME = 1e-6  # relative: both are float32
_EXPERT = re.compile(r"\bexperts\.\d+\.")


def as_stored(values: FloatArray) -> list[FloatArray]:
    """Numbers in float32, and as either 16-bit type stores them."""
    kinds = (torch.float16, torch.bfloat16)
    return [values, *(torch.from_numpy(values).to(kind).to(torch.float32).numpy() for kind in kinds)]


def check_epsilons(constants: Constants, checkpoint: Checkpoint) -> Iterator[WrongRows]:
    """Norms whose epsilon is not the config's, in one line.

    Of architectures of which it is known that all of their norms have this one.
    """
    config = checkpoint.config
    if find_refusal(config) is not None or not constants.norms:
        return
    family = find_decoder_family(config)
    norms = {
        name: as_stored(checkpoint.read(name).to(torch.float32).reshape(-1).numpy())
        for name in checkpoint.entries
        if (part := family.find_part(name)) is not None and CLASS_OF_PART[part] == "norm"
    }
    right = as_stored(np.array([config.rms_norm_eps], np.float32))
    wrong: list[tuple[str, float]] = []
    for norm in constants.norms:
        if any(abs(norm.epsilon - float(each[0])) <= _SAME * float(each[0]) for each in right):
            continue
        name = next((name for name, kinds in norms.items() if any(_is_same(norm.weight, own) for own in kinds)), None)
        if name is not None:
            wrong.append((name, norm.epsilon))
    if wrong:
        name, epsilon = wrong[0]
        others = len(wrong) - 1
        more = f"; and in {others} more norm{'s' if others > 1 else ''}" if others else ""
        what = f"epsilon in the file is {epsilon:.3g}, the twin's {config.rms_norm_eps:.3g}{more}"
        yield WrongRows(name_tensor(name, checkpoint.entries[name], 0)[0], 0, 1, 1, what, name)


def _is_same(found: FloatArray, true: FloatArray) -> bool:
    return len(found) == len(true) and np.allclose(found, true, rtol=_SAME, atol=0)


def check_input_scales(
    operators: Mapping[str, list[GraphMatrix]], checkpoint: Checkpoint, twin: Path
) -> Iterator[WrongRows]:
    """Products whose input scale in the file is not the twin's.

    Nor that of another expert: which experts stand in whose place is told by what they compute.
    """
    scales = Twin(twin).scheme["input_scales"] if (twin / SCHEME_NAME).is_file() else {}
    of_all: dict[str, list[float]] = {}
    for name, own in scales.items():
        of_all.setdefault(_EXPERT.sub("", name), []).extend(own)
    for name, own in scales.items():
        known = of_all[_EXPERT.sub("", name)]
        found = [matrix.input_rounding.scale for matrix in operators.get(name, ()) if matrix.input_rounding is not None]
        strange = [scale for scale in found if not any(abs(scale - true) <= _SAME * true for true in known)]
        if not strange:
            continue
        tensor, *_ = name_tensor(name, checkpoint.entries[name], 0)
        if len(own) > 1:  # of stacked experts each has its own
            tensor = f"{tensor.partition(', expert')[0]}, experts"
        what = (
            f"the scale of what it reads is {strange[0]:.4g} in the file, {_nearest(own, strange[0]):.4g} in the twin"
        )
        yield WrongRows(tensor, 0, 1, 1, what, name)


def _nearest(scales: list[float], scale: float) -> float:
    return min(scales, key=lambda own: abs(own - scale))
