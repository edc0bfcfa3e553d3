"""Vectors of the dense model, as labels of texts alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.data.blocks import read_facts, read_tensors
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.data.held_out import SPLITS
from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import LABELS, Examples
from dense2moe.upcycle.tasks.head import TEACHER
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.tasks.vectors import vector_task


@torch.inference_mode()
def teach_vectors(source: Path, data: Path, progress: Progress) -> None:
    """Give texts alone their vectors by the model in `source`.

    Into the files that `prepare_data` wrote in `data`, as `labels` float32 [N, D]; any other data stays as it is.

    Raises:
        UpcycleError: the checkpoint is damaged, or pools in a way that is not computed here.
    """
    if read_facts(data).get("problem") != TEACHER:
        return
    task = vector_task(TEACHER, read_pooling(source))
    model = load_model(source, torch.float32, task.name, task.head)
    for split in SPLITS:
        tensors = read_tensors(data, split)
        tensors[LABELS] = _embed(model, task, read_examples(data, split), partial(progress, f"embedding {split}"))
        save_file(tensors, data / f"{split}.safetensors")


def _embed(model: PreTrainedModel, task: Task, texts: Examples, report: Callable[[int, int], None]) -> torch.Tensor:
    """Vectors of texts [N, 1, S] in their order, [N, D]."""
    assert task.jointly is not None
    parts, found = texts.parts_by_length(EVALUATION_BATCH), []
    for number, places in enumerate(parts):
        report(number, len(parts))
        batch = texts.take(places).batch()
        found.append(task.jointly.keep(task.predictions(model(**task.inputs(batch))), batch)[:, 0])
    report(len(parts), len(parts))
    return torch.cat(found)[torch.cat(parts).argsort()]
