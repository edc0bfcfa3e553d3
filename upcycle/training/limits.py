"""What a model's depth and this installation allow of fine-tuning."""

from __future__ import annotations

import importlib.util

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.head import (
    COSINE,
    ENDS_OF_SPAN,
    RANKING,
    SEVERAL,
    TEACHER,
    VALUE,
    WITHOUT_NAMES,
    LabelHead,
)
from dense2moe.upcycle.training.config import FinetuneConfig


def check_finetune(config: FinetuneConfig, num_layers: int) -> None:
    """Refuse what the model's depth or this installation cannot do.

    It reads nothing large.

    Raises:
        UpcycleError: fewer layers than the last that are to learn, or no writer for TensorBoard.
    """
    for phase in config.resolve_phases():
        if phase.train.startswith("last-"):
            count_last_layers(phase.train, num_layers)
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UpcycleError(
            "finetune.tensorboard is true and tensorboardX is not installed; install it (pip install "
            "'dense2moe[tensorboard]'), or set it to false"
        )


def count_last_layers(train: str, num_layers: int) -> int:
    """N of 'last-N'.

    Raises:
        UpcycleError: the model has fewer layers.
    """
    count = int(train.removeprefix("last-"))
    if count > num_layers:
        raise UpcycleError(f"finetune.train is {train}; it must be at most last-{num_layers}, the layers of the model")
    return count


_NO_CHOICE = {
    SEVERAL: "labels may hold at once",
    VALUE: "labels are numbers to predict",
    ENDS_OF_SPAN: "answers are places in a context",
    COSINE: "texts have vectors and no labels",
    RANKING: "texts have vectors and no labels",
    TEACHER: "texts have vectors and no labels",
}
"""Why labels of a kind are not one of several."""


_NO_DISTRIBUTION = frozenset({VALUE, COSINE, RANKING, TEACHER})
"""Kinds whose predictions are no probabilities, which a temperature would soften."""


def check_label_loss(head: LabelHead, config: FinetuneConfig, num_processes: int = 1) -> None:
    """Refuse settings that say nothing of any labels.

    Raises:
        UpcycleError: weights of labels of which several may hold, either of values, vectors or answers, a temperature
        of
            what is no distribution, or a ranking of texts that are read alone.
    """
    kinds = set(head.kinds)
    why = next((reason for kind, reason in _NO_CHOICE.items() if kind in kinds), "")
    if config.class_weights != "none" and kinds <= _NO_CHOICE.keys():
        raise UpcycleError(
            f"finetune.class_weights: is '{config.class_weights}', and {why}; leave it out, as it weighs one label of "
            "several"
        )
    if config.label_smoothing and kinds <= WITHOUT_NAMES:
        raise UpcycleError(f"finetune.label_smoothing: is {config.label_smoothing}, and {why}; leave it out")
    if config.distillation and config.distillation.temperature != 1 and kinds <= _NO_DISTRIBUTION:
        raise UpcycleError(
            f"finetune.distillation.temperature: is {config.distillation.temperature:g}, and {why}, so there is no "
            "distribution to soften; leave it out"
        )
    num_parts = config.gradient_accumulation_steps * num_processes
    if RANKING in kinds and config.batch_size // num_parts < 2:
        raise UpcycleError(
            f"finetune.batch_size: is {config.batch_size}, in {num_parts} parts; a text is told from the others of its "
            "part, which must have 2 or more; raise it, or lower gradient_accumulation_steps"
        )
