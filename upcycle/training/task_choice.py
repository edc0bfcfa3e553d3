"""The task that a checkpoint is trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.data.blocks import read_facts
from dense2moe.upcycle.data.chats import CHATS
from dense2moe.upcycle.data.question_examples import read_asked
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.table import find_host
from dense2moe.upcycle.tasks.chat import CHAT
from dense2moe.upcycle.tasks.head import ANSWERING, VECTORS, LabelHead, join_head, read_parts
from dense2moe.upcycle.tasks.labels import PLAIN, LabelLoss, label_task
from dense2moe.upcycle.tasks.masked_token import masked_token, read_masking
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.questions import question_task
from dense2moe.upcycle.tasks.several import several_tasks
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.tasks.vectors import vector_task
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.limits import check_label_loss
from dense2moe.upcycle.training.processes import join_processes


def choose_task(directory: Path, data: Path | None = None, learned: LabelLoss = PLAIN) -> Task:
    """The task of labelled `data`; else of a checkpoint's head.

    Masked tokens, or the next token. `learned` is how labels are learned.

    Raises:
        UpcycleError: the config or the tokenizer cannot be read, or has no mask; or the model is a decoder that reads
            in both directions.
    """
    config = read_config(directory)
    if data is not None and "task" in (facts := read_facts(data)):
        return _TASKS.get(facts["task"], _choose_labels)(directory, data, facts, learned)
    if find_task_name(config) == "fill-mask":
        return masked_token(read_masking(load_tokenizer(directory), str(directory)))
    if not is_causal(config):
        what = "is_causal is False" if getattr(config, "is_causal", None) is False else "is_decoder is not true"
        raise UpcycleError(
            f"{directory / CONFIG_NAME}: {what}; a decoder that reads in both directions is not trained, "
            "as it sees the tokens that it would predict; switch fine-tuning off"
        )
    return NEXT_TOKEN


_Facts = Mapping[str, Any]
"""What `prepare_data` told of its data."""


def _choose_chat(_: Path, __: Path, ___: _Facts, ____: LabelLoss) -> Task:
    return CHAT


def _choose_vectors(directory: Path, _: Path, facts: _Facts, __: LabelLoss) -> Task:
    return vector_task(facts["problem"], read_pooling(directory))


def _choose_questions(_: Path, data: Path, facts: _Facts, __: LabelLoss) -> Task:
    return question_task(read_asked(data), read_head(facts))


def _choose_labels(_: Path, __: Path, facts: _Facts, learned: LabelLoss) -> Task:
    head = read_head(facts)
    return several_tasks(head, learned) if head.parts else label_task(facts["task"], head, learned)


_TASKS: Mapping[str, Callable[[Path, Path, _Facts, LabelLoss], Task]] = {
    CHATS: _choose_chat,
    VECTORS: _choose_vectors,
    ANSWERING: _choose_questions,
}
"""What makes the task of a checkpoint's directory and its data; of any other kind of data, labels."""


def read_head(facts: _Facts) -> LabelHead:
    """The head of labelled data, from its facts."""
    if "parts" not in facts:
        return LabelHead(tuple(facts["labels"]), facts["problem"])
    return join_head(read_parts(facts["parts"]), facts["place"])


def choose_label_loss(data: Path, config: FinetuneConfig) -> LabelLoss:
    """How labels are learned: smoothed, and weighed by how rare they are.

    Balanced weights are N / (labels * count) of each label (King and Zeng 2001, as in scikit-learn), 1 in the mean.

    Raises:
        UpcycleError: as `check_label_loss`.
    """
    facts = read_facts(data)
    if "task" not in facts or facts["task"] == CHATS:
        return LabelLoss(config.label_smoothing)
    head = read_head(facts)
    check_label_loss(head, config, int(join_processes().num_processes))
    if config.class_weights == "none":
        return LabelLoss(config.label_smoothing)
    counts = facts["label_counts"]["train"]
    groups = [part.names for part in head.parts] or [tuple(counts)]
    weights = tuple(weight for names in groups for weight in balance([counts.get(name, 0) for name in names]))
    return LabelLoss(config.label_smoothing, weights)


def balance(counts: Sequence[int]) -> list[float]:
    """A weight for each label, by how often it is there.

    N / (labels * count), 0 of labels that no example has.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def find_task_name(config: PreTrainedConfig) -> str:
    """The task of a config's head, as Hugging Face names it.

    The config is a host's or its mixture's. Every other model here predicts the next token.
    """
    host = find_host(config.model_type)
    names = [name.removeprefix(CLASS_PREFIX) for name in config.architectures or ()]
    found = host.find_task(names[0]) if host is not None and names else None
    return found or "text-generation"
