"""Heads by class: a config's task, and classes for other tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.heads import LABEL_FIELDS, PARTS_FIELD, TASK_OF_HEAD, split_class
from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.table import find_host
from dense2moe.upcycle.tasks.head import HeadPart, LabelHead, TokenPlace, read_parts


def has_head(config: PreTrainedConfig, task: str, head: LabelHead) -> bool:
    """Whether a checkpoint's head has these labels for this task.

    Of a task without labels, whether it is of that task.
    """
    has_labels = head.labels in ((), list_labels(config)) and head.parts == list_parts(config)
    return find_task_of(config) == task and has_labels


def list_labels(config: PreTrainedConfig) -> tuple[str, ...]:
    """A config's labels in the order of their numbers."""
    names: dict[int, str] = cast(Any, config.id2label) or {}
    return tuple(name for _, name in sorted(names.items()))


def list_parts(config: PreTrainedConfig) -> tuple[HeadPart, ...]:
    """The tasks that share a config's head.

    None where the head is of one task.

    Raises:
        UpcycleError: they are told otherwise than `put_head` does.
    """
    told = getattr(config, PARTS_FIELD, None) or ()
    with one_line_errors(Path(CONFIG_NAME), f"tells no tasks as {PARTS_FIELD}", "take the file as it was written"):
        return read_parts(told)


def find_place(config: PreTrainedConfig) -> TokenPlace:
    """The token at which labels of whole texts are read."""
    return "last" if is_causal(config) else "first"


def find_task_of(config: PreTrainedConfig) -> str | None:
    """The task of a config's class, as Hugging Face names it."""
    name = (config.architectures or [""])[0]
    host = find_host(config.model_type)
    if host is not None:
        return host.find_task(name.removeprefix(CLASS_PREFIX))
    return TASK_OF_HEAD.get(split_class(name)[1])


def name_class(config: PreTrainedConfig, task: str) -> str | None:
    """The class of a config's family for a task.

    The config's own where it is for the task; None where the family has none, or one that is refused.
    """
    if config.architectures and find_task_of(config) == task:
        return config.architectures[0]
    ends = next(ends for ends, found in TASK_OF_HEAD.items() if found == task)
    host, own = find_host(config.model_type), CLASS_PREFIX if is_own(config.model_type) else ""
    start = host.start if host is not None else split_class((config.architectures or [""])[0])[0]
    name = start + ends
    if not hasattr(transformers, name) or (host is not None and host.find_task(name) != task):
        return None
    return own + name


def find_padding(config: PreTrainedConfig) -> int:
    """The token id that padding of labelled texts has.

    Heads of decoders look for the last token that is none of it, so model and data must have one.
    """
    found = getattr(config.get_text_config(), "pad_token_id", None)
    return 0 if found is None else int(found)


def put_head(config: PreTrainedConfig, task: str, head: LabelHead, where: Path) -> PreTrainedConfig:
    """A config with the class and the labels of a head.

    Raises:
        UpcycleError: the family has no such class.
    """
    name = name_class(config, task)
    if name is None:
        raise UpcycleError(
            f"{where / CONFIG_NAME}: model_type is {config.model_type}, of which transformers has no model for {task}; "
            "give a checkpoint of a family that has one, such as bert"
        )
    known = {name: value for name, value in config.to_dict().items() if name not in (*LABEL_FIELDS, PARTS_FIELD)}
    made = type(config)(**known)
    made.architectures = [name]
    if head.labels:
        made.id2label = dict(enumerate(head.labels))
        made.label2id = {label: number for number, label in enumerate(head.labels)}
    if hasattr(made, "pad_token_id"):
        made.pad_token_id = find_padding(config)
    made.problem_type = cast(Any, head.problem_type)
    if head.parts:
        setattr(made, PARTS_FIELD, [asdict(part) for part in head.parts])
    return made
