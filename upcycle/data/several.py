"""Several labelled sets as the examples of one model.

Each is read, divided and encoded as it would be alone. A training text that any of them holds out for the test is left
out of all, so that no test split is trained on; so is one that is held out for validation. All have their tasks' number
(`parts`) and their task's labels under a name of its own; the labels of other tasks are absent there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.class_heads import find_padding, find_place, has_head
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.data.config import DataConfig, HubTableData, TasksData
from dense2moe.upcycle.data.encoded import Encoded
from dense2moe.upcycle.data.files import task_place
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.labelled import (
    check_sizes,
    choose_encoder,
    digest_rows,
    limit_rows,
    read_labelled,
)
from dense2moe.upcycle.data.rows import LabelledRow
from dense2moe.upcycle.data.vocabulary import Vocabulary, count_labels, find_vocabulary
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, PARTS, TYPES, UNLABELLED, labels_of
from dense2moe.upcycle.tasks.head import OF_WORDS, HeadPart, join_head

_Rows = Mapping[Split, Sequence[LabelledRow]]


@dataclass(frozen=True)
class _Task:
    """One of the tasks: its rows, and its labels."""

    name: str
    rows: _Rows
    vocabulary: Vocabulary
    num_shared: int

    @property
    def part(self) -> HeadPart:
        """Its part of the head."""
        return HeadPart(self.name, self.vocabulary.task, self.vocabulary.labels, self.vocabulary.problem)


def prepare_tasks(
    source: Path, output: Path, config: DataConfig, data: TasksData, base: Path, progress: Progress
) -> dict[str, Any]:
    """Write `train`, `validation` and `test` as safetensors; returns the facts.

    Texts as of `prepare_labelled`, of all tasks in their order; `parts` and `domains`, int32 [N], have the number of
    each text's task, `labels.NUMBER` the labels of that task: -100, or 0.0 of real numbers, at texts of others.

    Raises:
        UpcycleError: as `prepare_labelled`, of the first task that is wrong.
    """
    model_config = read_config(source)
    tasks = _read_tasks(data, base)
    whole = _join(tasks, model_config)
    rows = [limit_rows(task.rows, config) for task in tasks]
    encoders = [choose_encoder(source, config, task.vocabulary) for task in tasks]
    repeats = _repeat([len(own["train"]) for own in rows], data.temperature)
    facts: dict[str, Any] = {
        "block_size": 0,
        "num_tokens": {},
        "num_examples": {},
        "domains": [task.name for task in tasks],
        "digest": hashlib.sha256("".join(digest_rows(task.rows) for task in tasks).encode()).hexdigest(),
        "task": whole.task,
        "labels": list(whole.labels),
        "problem": whole.problem,
        "parts": [asdict(part) for part in whole.parts],
        "place": whole.place,
        "new_head": not has_head(model_config, whole.task, whole.head),
        "label_counts": {
            split: {
                f"{task.name}/{label}": count
                for task, own in zip(tasks, rows, strict=True)
                for label, count in count_labels(own[split], task.vocabulary).items()
            }
            for split in SPLITS
        },
        "num_shared_with_held_out": sum(task.num_shared for task in tasks),
        "num_cut": {},
        "repeats": dict(zip((task.name for task in tasks), repeats, strict=True)),
    }
    for number, split in enumerate(SPLITS):
        progress("encoding", number, len(SPLITS))
        encoded = [encode(own[split]) for encode, own in zip(encoders, rows, strict=True)]
        times = repeats if split == "train" else [1.0] * len(tasks)
        tensors = _stack(encoded, times, find_padding(model_config))
        save_file(tensors, output / f"{split}.safetensors")
        facts["num_examples"][split] = len(tensors[PARTS])
        facts["num_tokens"][split] = int(tensors[MASK].sum())
        facts["num_cut"][split] = sum(each.num_cut for each in encoded)
        facts["block_size"] = max(facts["block_size"], *(each.longest for each in encoded))
    progress("encoding", len(SPLITS), len(SPLITS))
    return facts


def check_tasks(source: Path, config: DataConfig, data: TasksData, base: Path) -> Vocabulary | None:
    """As `check_labelled`, of every task.

    Raises:
        UpcycleError: as `prepare_tasks`.
    """
    load_tokenizer(source)
    if any(isinstance(own, HubTableData) for own in data.tasks.values()):
        return None
    tasks = _read_tasks(data, base)
    for task in tasks:
        encode = choose_encoder(source, config, task.vocabulary)
        for split in SPLITS:
            encode(task.rows[split][:1])
    return _join(tasks, read_config(source))


def _read_tasks(data: TasksData, base: Path) -> list[_Task]:
    """Every task's rows, without training texts that another holds out."""
    read = {name: read_labelled(own, base, task_place(name)) for name, own in data.tasks.items()}
    tested = {row.key for found in read.values() for row in found.rows["test"]}
    held_out = tested | {row.key for found in read.values() for row in found.rows["validation"]}
    without: dict[Split, set[str]] = {"train": held_out, "validation": tested, "test": set()}
    tasks = []
    for name, found in read.items():
        rows = {split: [row for row in found.rows[split] if row.key not in without[split]] for split in SPLITS}
        check_sizes(rows, SPLITS, task_place(name))
        vocabulary = find_vocabulary(rows, PreTrainedConfig(), task_place(name))
        num_shared = found.num_shared + len(found.rows["train"]) - len(rows["train"])
        tasks.append(_Task(name, rows, vocabulary, num_shared))
    return tasks


def _join(tasks: Sequence[_Task], config: PreTrainedConfig) -> Vocabulary:
    """The labels of all tasks in one head.

    Raises:
        UpcycleError: two labels have one name there.
    """
    owners: dict[str, str] = {}
    for task in tasks:
        for name in task.part.names:
            if (other := owners.setdefault(name, task.name)) != task.name:
                own = name.removeprefix(f"{task.name}/")
                raise UpcycleError(
                    f"{task_place(task.name)}: its label '{own}' and one of '{other}' are "
                    f"both '{name}' in the shared head; give one of the tasks a name without '/'"
                )
    head = join_head(tuple(task.part for task in tasks), find_place(config))
    return Vocabulary(OF_WORDS, head.labels, None, head.parts, head.place)


def _repeat(sizes: Sequence[int], temperature: float) -> list[float]:
    """How often each task's examples are met in an epoch.

    The largest task's once. Mixing by temperature (Raffel et al. 2020, section 3.5.2).
    """
    largest = max(sizes)
    return [(largest / size) ** (1 - 1 / temperature) for size in sizes]


def _stack(encoded: Sequence[Encoded], repeats: Sequence[float], padding: int) -> dict[str, torch.Tensor]:
    """The tensors of all tasks, one task behind the other."""
    length = max(each.longest for each in encoded)
    places = [_meet(len(each.tensors[IDS]), times) for each, times in zip(encoded, repeats, strict=True)]
    made = {
        name: torch.cat(
            [_widen(each.tensors[name][own], length, filling) for each, own in zip(encoded, places, strict=True)]
        )
        for name, filling in {IDS: padding, MASK: 0, TYPES: 0}.items()
        if name in encoded[0].tensors
    }
    numbers = torch.cat([torch.full((len(own),), number, dtype=torch.int32) for number, own in enumerate(places)])
    for number, (each, own) in enumerate(zip(encoded, places, strict=True)):
        labels = each.tensors[LABELS][own]
        if labels.ndim == 2 and not labels.is_floating_point():
            labels = _widen(labels, length, UNLABELLED)
        absent = 0.0 if labels.is_floating_point() else UNLABELLED
        found = torch.full((len(numbers), *labels.shape[1:]), absent, dtype=labels.dtype)
        found[numbers == number] = labels
        made[labels_of(number)] = found
    return {**made, PARTS: numbers, "domains": numbers.clone()}


def _meet(count: int, times: float) -> torch.Tensor:
    """Places of `count` examples, each met about as often as the others."""
    wanted = round(count * times)
    return torch.arange(wanted) * count // wanted


def _widen(rows: torch.Tensor, length: int, filling: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=filling)
