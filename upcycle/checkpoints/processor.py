"""Image processors of checkpoints: how images become numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dense2moe.upcycle.errors import UpcycleError, one_line_errors

PROCESSOR_NAME = "preprocessor_config.json"


def load_processor(directory: Path) -> Any:
    """The image processor beside a checkpoint, as transformers loads it.

    Raises:
        UpcycleError: there is none, or it cannot be loaded.
    """
    if not (directory / PROCESSOR_NAME).is_file():
        raise UpcycleError(
            f"{directory}: has no {PROCESSOR_NAME}, which says how images become numbers; put the model's own there"
        )
    from transformers import AutoImageProcessor  # slow to import, and only images need it
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without torchvision it says that it takes Pillow
    try:
        with (
            one_line_errors(directory / PROCESSOR_NAME, "transformers cannot load it", "restore the file"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(before)


def open_image(file: Path) -> Any:
    """An image file, read whole.

    Raises:
        UpcycleError: it is no image, or cannot be read.
    """
    from PIL import Image  # slow to import, and only images need it

    with one_line_errors(file, "is no image", "leave it out, or convert it to PNG or JPEG"), Image.open(file) as image:
        image.load()
        return image.copy()


def process_images(processor: Any, images: Sequence[Any], where: Path) -> torch.Tensor:
    """Images as a model reads them, float32 [N, channels, height, width].

    In RGB, or in grey where the processor says so.

    Raises:
        UpcycleError: the processor cannot read one; the line begins with `where`.
    """
    mode = "L" if getattr(processor, "do_convert_rgb", None) is False else "RGB"
    with one_line_errors(where, "the processor cannot read it", "convert it to RGB"):
        pixels: torch.Tensor = processor([image.convert(mode) for image in images], return_tensors="pt")["pixel_values"]
        return pixels.float()
