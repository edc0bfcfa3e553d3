"""A head that a checkpoint does not have, put on its layers.

A base model, or one that predicts masked tokens, becomes one with labels. The layers' weights are loaded as ever, whole
or not at all; the old head is left behind, and the new one is drawn by transformers' own initialization, always the
same: a dense model and the mixture made of it begin with one head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from dense2moe.upcycle.checkpoints.class_heads import find_task_of, put_head
from dense2moe.upcycle.checkpoints.layers import leave_out_absent
from dense2moe.upcycle.checkpoints.loading import check_whole, load_pretrained, refuse_incomplete
from dense2moe.upcycle.checkpoints.mixture_classes import find_class
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.models.table import find_hosted
from dense2moe.upcycle.tasks.head import LabelHead
from dense2moe.upcycle.tasks.model_class import find_model_class

_SEED = 0
_DROPPED = ("*pooler.*",)  # what some heads read, and others leave out


def load_headed(directory: Path, dtype: torch.dtype, task: str, head: LabelHead) -> PreTrainedModel:
    """A checkpoint's layers with another head, in evaluation mode.

    Raises:
        UpcycleError: as `put_head`, or a weight of the layers is missing, left over or of another shape.
    """
    hosted = find_hosted(read_config(directory))
    own_class = find_model_class(find_task_of(read_config(directory)) or "feature-extraction")
    checkpoint = check_whole(own_class if hosted is None else find_class(hosted), directory)
    config = put_head(checkpoint.config, task, head, directory)
    model_class = find_class((config.architectures or [""])[0])
    with (
        torch.random.fork_rng(devices=[]),
        _without_report(),
        one_line_errors(directory, "transformers cannot load this checkpoint", "download it again, or correct it"),
    ):
        torch.manual_seed(_SEED)
        prefix = f"{model_class.base_model_prefix}."
        is_base = not any(name.startswith(prefix) for name in checkpoint.entries)
        model, info = load_pretrained(
            model_class,
            directory,
            dtype,
            config=config,
            reads=lambda name: is_base or name.startswith(prefix),  # an old head may have the new one's shapes
            ignore_mismatched_sizes=True,
        )
    has_head = model.base_model is not model
    refuse_incomplete(_of_layers(info, prefix if has_head else ""), str(directory))
    if has_head:
        leave_out_absent(model, [*checkpoint.entries, *model.state_dict()])
    else:  # what stands behind its layers, such as a pooler, is drawn and read by nobody
        leave_out_absent(model, [name.removeprefix(prefix) for name in checkpoint.entries])
    return cast(PreTrainedModel, model.eval())


@contextmanager
def _without_report() -> Iterator[None]:
    """Context manager: transformers does not warn of heads, which are told here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _of_layers(info: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Loading info without tensors of the new head."""

    def is_dropped(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in _DROPPED)

    missing = [name for name in info["missing_keys"] if name.startswith(prefix) and not is_dropped(name)]
    unexpected = [name for name in info["unexpected_keys"] if not is_dropped(name)]
    mismatched = [each for each in info["mismatched_keys"] if each[0].startswith(prefix)]
    return {**info, "missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
