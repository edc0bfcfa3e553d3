"""Labelled images: of folders, of scikit-learn, of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.processor import open_image, process_images
from dense2moe.upcycle.data.config import DigitsData, HubTableData, ImagesData
from dense2moe.upcycle.data.files import image_files
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.errors import UpcycleError, one_line_errors

_BATCH = 64
_DIGIT_SCALE = 255 // 16  # of scikit-learn's digits, whose ink is 0 to 16


@dataclass(frozen=True)
class LabelledImage:
    """An image, or its file, with its label.

    key: what tells it from others, a digest of its content.
    """

    where: str
    key: str
    label: str
    image: Any = field(repr=False)

    @property
    def answer(self) -> str:
        """Its label."""
        return self.label


def read_image_splits(data: ImagesData | DigitsData, base: Path) -> Iterator[tuple[Split, list[LabelledImage]]]:
    """The images of each split that is given.

    Raises:
        UpcycleError: a folder is missing or empty, or an image cannot be read.
    """
    if isinstance(data, DigitsData):
        yield "train", read_digits()
        return
    for split, files in image_files(data, base).items():
        if files:
            yield split, [_read_file(file) for file in files]


def _read_file(file: Path) -> LabelledImage:
    with one_line_errors(file, "cannot be read", "mend its mode or its disk"):
        content = file.read_bytes()
    open_image(file)
    return LabelledImage(str(file), hashlib.sha256(content).hexdigest(), file.parent.name, file)


def read_digits() -> list[LabelledImage]:
    """Scikit-learn's digits, 8 by 8, white ink on black."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * _DIGIT_SCALE).astype(np.uint8)
    return [
        LabelledImage(f"digit {number}", f"{number} {image.tobytes().hex()}", str(label), Image.fromarray(image))
        for number, (image, label) in enumerate(zip(images, found.target, strict=True))
    ]


def read_hub_images(rows: Any, data: HubTableData) -> Iterator[LabelledImage]:
    """Images of the hub, with the names of their labels."""
    assert data.image is not None
    for column in (data.image, data.label):
        if column not in rows.column_names:
            raise UpcycleError(
                f"data.source: data set '{data.path}' has no column '{column}'; it has {', '.join(rows.column_names)}"
            )
    feature = rows.features[data.label]
    for number, row in enumerate(rows):
        image, label = row[data.image], row[data.label]
        name = feature.int2str(label) if hasattr(feature, "int2str") else str(label)
        key = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
        yield LabelledImage(f"data set '{data.path}', row {number}", key, name, image)


def process(processor: Any, rows: Sequence[LabelledImage]) -> torch.Tensor:
    """Images as a model reads them, float32 [N, channels, height, width].

    Raises:
        UpcycleError: an image cannot be read.
    """
    parts = []
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        images = [open_image(row.image) if isinstance(row.image, Path) else row.image for row in some]
        parts.append(process_images(processor, images, Path(some[0].where)))
    return torch.cat(parts)


def count_image_tokens(config: PreTrainedConfig) -> int:
    """Positions of an image in a model of patches; else 1."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None or patch is None:
        return 1
    sizes = [size, size] if isinstance(size, int) else list(size)
    patches = [patch, patch] if isinstance(patch, int) else list(patch)
    return int((sizes[0] // patches[0]) * (sizes[1] // patches[1]) + 1)
