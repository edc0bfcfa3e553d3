"""What a model's depth and this installation allow of fine-tuning."""

from __future__ import annotations

import importlib.util

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.head import SEVERAL, VALUE, LabelHead
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


def check_label_loss(head: LabelHead, config: FinetuneConfig) -> None:
    """Refuse settings that say nothing of any labels.

    Raises:
        UpcycleError: weights of labels of which several may hold, or either of values.
    """
    kinds = set(head.kinds)
    if config.class_weights != "none" and kinds <= {SEVERAL, VALUE}:
        what = "are numbers to predict" if kinds == {VALUE} else "may hold at once"
        raise UpcycleError(
            f"finetune.class_weights: is '{config.class_weights}', and labels {what}; leave it out, as it weighs one "
            "label of several"
        )
    if config.label_smoothing and kinds == {VALUE}:
        raise UpcycleError(
            f"finetune.label_smoothing: is {config.label_smoothing}, and labels are numbers to predict; leave it out"
        )
