"""Training on labels that is killed ends as if it had not been; its controls read the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_label_training import quiet, save_bert, write_classes, write_words
from training_runs import Killed, weights

from dense2moe.upcycle.building.config import ExpertsConfig, GateConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import DataConfig
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.order import draw_order
from dense2moe.upcycle.training.task_choice import choose_task
from dense2moe.upcycle.training.trainer import PhaseTrainer

# 60 texts, less the held-out ones, in batches of 8: an epoch ends within a batch, and 12 steps take two of them
CONFIG = FinetuneConfig(
    steps=12,
    warmup_steps=2,
    eval_steps=4,
    batch_size=8,
    learning_rate=1e-3,
    layer_decay=0.8,
    router_noise=0.2,
    sparsity_coefficient=0.01,
)
Source = tuple[str, Callable[[Path], str], dict[str, Any]]
SOURCES: list[Source] = [
    ("one label a text", write_classes, {"kind": "table", "train": ["rows.jsonl"]}),
    ("a tag a word", write_words, {"kind": "conll", "train": ["words.conll"]}),
]


@pytest.fixture(scope="module", name="made", params=SOURCES, ids=[name for name, _, _ in SOURCES])
def _made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its mixture and encoded texts."""
    folder, (_, write, source) = tmp_path_factory.mktemp("labels"), request.param
    dense = save_bert(folder / "dense", hidden_dropout_prob=0.1)
    write(folder)
    for name in ("mixture", "data"):
        (folder / name).mkdir()
    settings = UpcycleConfig(
        num_experts=4,
        num_experts_per_tok=3,
        experts=ExpertsConfig(noise=0.1),
        router=RouterConfig(form="mlp", size=8),
        gate=GateConfig(choice="top-p", p=0.6),
    )
    upcycle(dense, folder / "mixture", settings, 0, quiet)
    data = DataConfig.model_validate({"source": source, "block_size": 24})
    prepare_data(dense, folder / "data", data, folder, quiet)
    return folder


def train(made: Path, output: Path, scratch: Path, progress: Any = quiet) -> FinetuneFacts:
    for folder in (output, scratch):
        folder.mkdir(exist_ok=True)
    task = choose_task(made / "mixture", made / "data")
    folders = (made / "dense", made / "mixture", made / "data", output)
    return finetune(*folders, CONFIG, 0, progress, scratch, task=task)


def test_labels_are_learned_to_the_same_weights_by_a_run_that_was_killed(made: Path, tmp_path: Path) -> None:
    whole = train(made, tmp_path / "whole", tmp_path / "one")
    for killed_at in (3, 6, 9):
        output, scratch = tmp_path / f"killed at {killed_at}", tmp_path / f"scratch {killed_at}"

        def progress(what: str, done: int, total: int, at: int = killed_at) -> None:
            if what.startswith("training fine-tuned") and done == at:
                raise Killed

        with pytest.raises(Killed):
            train(made, output, scratch, progress)
        taken_up = train(made, output, scratch)
        for name, expected in weights(tmp_path / "whole").items():
            assert torch.equal(weights(output)[name], expected), name
        assert taken_up.best_steps == whole.best_steps
        assert [step.train_loss for step in taken_up.history] == [step.train_loss for step in whole.history]


def test_mixture_and_controls_read_the_same_batches_of_like_lengths(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[Any]] = {}
    compute_loss = PhaseTrainer.compute_loss

    def note(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        read.setdefault(self.phase.model, []).append(inputs["input_ids"].tolist())
        return compute_loss(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(PhaseTrainer, "compute_loss", note)
    train(made, tmp_path / "output", tmp_path / "scratch")
    assert set(read) == {"fine-tuned", "dense continued", "dense, same FLOPs"}
    batches = read["fine-tuned"]
    assert len(batches) == 12
    assert read["dense continued"] == batches
    assert read["dense, same FLOPs"][:12] == batches
    padded = sum(row.count(0) for batch in batches for row in batch)  # [PAD] is token 0
    lengths = read_examples(made / "data", "train").lengths
    at_random = [lengths[list(draw_order(len(lengths), 96, 0)[begin : begin + 8])] for begin in range(0, 96, 8)]
    assert padded < 0.7 * sum(int(batch.max()) * 8 - int(batch.sum()) for batch in at_random)
