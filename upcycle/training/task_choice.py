"""The task that a checkpoint is trained for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.table import find_host
from dense2moe.upcycle.tasks.masked_token import masked_token, read_masking
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task


def choose_task(directory: Path) -> Task:
    """The task of a checkpoint's head: masked tokens, or the next token.

    Raises:
        UpcycleError: the config or the tokenizer cannot be read, or has no mask; or the model is a decoder that reads
            in both directions.
    """
    config = read_config(directory)
    if find_task_name(config) == "fill-mask":
        return masked_token(read_masking(load_tokenizer(directory), str(directory)))
    if not is_causal(config):
        what = "is_causal is False" if getattr(config, "is_causal", None) is False else "is_decoder is not true"
        raise UpcycleError(
            f"{directory / CONFIG_NAME}: {what}; a decoder that reads in both directions is not trained, "
            "as it sees the tokens that it would predict; switch fine-tuning off"
        )
    return NEXT_TOKEN


def find_task_name(config: PreTrainedConfig) -> str:
    """The task of a config's head, as Hugging Face names it.

    The config is a host's or its mixture's. Every other model here predicts the next token.
    """
    host = find_host(config.model_type)
    names = [name.removeprefix(CLASS_PREFIX) for name in config.architectures or ()]
    found = host.find_task(names[0]) if host is not None and names else None
    return found or "text-generation"
