"""A task says which class loads a model, what a batch is to it, and what a model is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from training_runs import CONFIG, make_data, quiet
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.model_class import find_model_class
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Batch, Task
from dense2moe.upcycle.training.evaluation import evaluate
from dense2moe.upcycle.training.fine_tuning import finetune

data = make_data  # a fixture


def test_a_task_knows_the_class_of_its_models() -> None:
    assert NEXT_TOKEN.model_class is AutoModelForCausalLM
    assert find_model_class("text2text-generation") is AutoModelForSeq2SeqLM


def test_the_next_token_s_figures_are_perplexity_and_the_loss_itself() -> None:
    assert NEXT_TOKEN.figures([1.0, 3.0], []) == (
        Figure("perplexity", math.exp(2.0), "", "lower"),
        Figure("loss", 2.0, "nats", "lower"),
    )


@pytest.fixture
def certainty() -> Task:
    """Another task: how sure a model is of its likeliest token, whatever follows."""

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        assert batch["input_ids"].shape == logits.shape[:2]
        return -logits.float().log_softmax(-1).amax(-1).mean()

    def figures(losses: Sequence[float], _: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
        return (Figure("certainty", math.exp(-fmean(losses)), "", "higher"),)

    return replace(NEXT_TOKEN, loss=loss, figures=figures)


def test_a_model_is_judged_by_its_task(certainty: Task, dense_checkpoint: Path, data: Path) -> None:
    blocks = read_blocks(data, "test")[:3]
    found = evaluate(dense_checkpoint, Examples.of_blocks(blocks), "dense", quiet, certainty)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(dense_checkpoint, dtype=torch.float32)(blocks).logits
    (figure,) = found.figures
    assert (figure.name, figure.better) == ("certainty", "higher")
    assert figure.value == pytest.approx(float(logits.softmax(-1).amax(-1).log().mean().exp()), rel=1e-5)


def test_a_model_is_trained_for_its_task(
    certainty: Task, dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Train for certainty, and it rises; the validation loss is the task's own."""
    config = CONFIG.model_copy(update={"learning_rate": 3e-3})

    output = tmp_path / "output"
    output.mkdir()
    scratch = tmp_path / "scratch"
    facts = finetune(dense_checkpoint, mixture_checkpoint, data, output, config, 0, quiet, scratch, certainty)
    before, after = (facts.evaluations[name].figures[0].value for name in ("upcycled", "fine-tuned"))
    assert after > 1.5 * before
    looks = [step.validation_loss for step in facts.history if step.validation_loss is not None]
    assert looks[0] == pytest.approx(-math.log(before), rel=0.05)
