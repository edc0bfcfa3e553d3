"""What a model's depth and this installation allow of fine-tuning."""

from __future__ import annotations

import importlib.util

from dense2moe.upcycle.errors import UpcycleError
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
