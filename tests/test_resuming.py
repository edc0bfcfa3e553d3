"""A killed run ends as if it had not been killed, and what stops a run is told in a line."""

from __future__ import annotations

import errno
import gc
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate import Accelerator
from training_runs import (
    BLOCK,
    CONFIG,
    Killed,
    Start,
    TrainAlone,
    changed,
    make_biased,
    make_data,
    make_reference,
    make_start,
    make_train_alone,
    quiet,
    read_biases,
)

from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.durable import is_kept
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.training.config import FinetuneConfig, TrainingPhase
from dense2moe.upcycle.training.history import write_history, write_whole
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.phase_run import run_phase
from dense2moe.upcycle.training.prompt import run_with_prompt

data, start, train_alone = make_data, make_start, make_train_alone  # fixtures
reference, biased = make_reference, make_biased


# Killed, and taken up again


@pytest.mark.parametrize(
    ("at", "mixture"),
    # before and behind a checkpoint, at a stage's beginning, and at the end
    [*((at, "mixture_checkpoint") for at in (1, 2, 3, 5, 10, 12)), *((at, "biased") for at in (3, 7))],
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    at: int,
    mixture: str,
    train_alone: TrainAlone,
    reference: TrainAlone,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    source = request.getfixturevalue(mixture)
    train_alone = partial(train_alone, mixture=source)
    config = CONFIG.model_copy(
        update={"stages": (TrainingPhase(train="router", steps=4), TrainingPhase(steps=8)), "expert_dropout": 0.1}
    )
    whole, untouched = reference(config, mixture=source)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == at:
            raise Killed

    with pytest.raises(Killed):
        train_alone(config, tmp_path, progress)
    taken_up, output = train_alone(config, tmp_path)
    assert changed(untouched, output) == set()
    assert taken_up.history == whole.history
    assert taken_up.best_step == whole.best_step
    if mixture == "biased":
        assert read_biases(output).abs().amin(-1).max() > 0


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_stage_that_was_killed_before_its_first_checkpoint_begins_with_the_same_random_numbers(
    train: str, train_alone: TrainAlone, tmp_path: Path
) -> None:
    stages = (TrainingPhase(train="router", steps=4), TrainingPhase(train=train, steps=4))
    config = CONFIG.model_copy(update={"stages": stages, "expert_dropout": 0.1})
    _, untouched = train_alone(config)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise Killed

    with pytest.raises(Killed):
        train_alone(config, tmp_path, progress)
    assert changed(untouched, train_alone(config, tmp_path)[1]) == set()


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_seed_alone_decides_and_the_generators_of_the_process_stay_where_they_are(
    train: str, train_alone: TrainAlone
) -> None:
    config = CONFIG.model_copy(update={"train": train, "expert_dropout": 0.1, "steps": 2})
    outputs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
            outputs.append(train_alone(config)[1])
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]
    assert changed(*outputs) == set()


@pytest.mark.parametrize("patience", [1, 99])
@pytest.mark.parametrize("cut", ["record", "weights"])
def test_a_run_killed_between_its_last_checkpoint_and_its_end_does_not_train_on(
    cut: str,
    patience: int,
    train_alone: TrainAlone,
    reference: TrainAlone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With patience it was to end before its last step, and without at it."""
    config = CONFIG.model_copy(
        update={
            "patience": patience,
            "learning_rate": 1e-20,
            "router_learning_rate": 1e-20,
            "eval_steps": 1,
            "steps": 3,
        }
    )
    whole, untouched = reference(config)
    assert whole.last_step == (1 if patience == 1 else 3)
    plain = os.replace

    def replace(fresh: Path, path: Path) -> None:
        if Path(path).match("trained/kept.json"):
            raise Killed
        plain(fresh, path)

    def save(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if cut == "record":
            patch.setattr(os, "replace", replace)
        else:
            patch.setattr("dense2moe.upcycle.training.job._save", save)
        train_alone(config, tmp_path)
    stage = tmp_path / "fine-tuned" / "phase-0"
    assert not is_kept(stage / "trained")
    assert any((stage / "checkpoints").iterdir())
    seen: list[int] = []
    found, output = train_alone(
        config, tmp_path, lambda what, done, _: seen.append(done) if what.startswith("training fine-tuned") else None
    )
    assert seen == []
    assert changed(untouched, output) == set()
    assert (found.last_step, found.best_step, found.history) == (whole.last_step, whole.best_step, whole.history)


def test_checkpoints_that_a_kill_left_are_not_in_what_is_written(train_alone: TrainAlone, tmp_path: Path) -> None:
    train_alone(CONFIG, tmp_path)
    left = tmp_path / "fine-tuned" / "phase-0" / "checkpoints" / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "optimizer.pt").touch()
    _, output = train_alone(CONFIG, tmp_path)
    assert not (output / "checkpoints").exists()
    assert not left.exists()


def test_the_checkpoint_before_stays_until_the_next_is_whole(
    train_alone: TrainAlone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def write(path: Path, history: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise Killed
        write_history(path, history)

    monkeypatch.setattr("dense2moe.upcycle.training.watch.write_history", write)
    with pytest.raises(Killed):
        train_alone(CONFIG, tmp_path)
    checkpoints = tmp_path / "fine-tuned" / "phase-0" / "checkpoints"
    assert (checkpoints / "checkpoint-2" / "history.jsonl").is_file()
    assert (checkpoints / "checkpoint-4" / "optimizer.pt").is_file()


def test_only_the_best_checkpoint_and_the_latest_are_kept(train_alone: TrainAlone, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise Killed

    # No look is better than the start.
    with pytest.raises(Killed):
        train_alone(
            CONFIG.model_copy(update={"learning_rate": 1e-20, "router_learning_rate": 1e-20, "eval_steps": 1}),
            tmp_path,
            progress,
        )
    kept = (tmp_path / "fine-tuned" / "phase-0" / "checkpoints").iterdir()
    assert {folder.name for folder in kept} == {"start", "checkpoint-4"}


def test_the_start_is_forgotten_when_a_look_is_better(train_alone: TrainAlone, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise Killed

    with pytest.raises(Killed):
        train_alone(CONFIG.model_copy(update={"eval_steps": 1}), tmp_path, progress)
    kept = {folder.name for folder in (tmp_path / "fine-tuned" / "phase-0" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4"}


@pytest.mark.parametrize(("at", "train"), [(1, "all"), (2, "lora"), (4, "all")])
def test_a_killed_run_that_only_harms_ends_with_the_weights_of_the_start(
    at: int, train: str, start: Start, reference: TrainAlone, tmp_path: Path
) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == at:
            raise Killed

    _, learned = reference(CONFIG.model_copy(update={"steps": 60, "learning_rate": 1e-2}))
    config = CONFIG.model_copy(
        update={"steps": 4, "learning_rate": 3.0, "router_learning_rate": 3.0, "train": train, "lora_alpha": 64}
    )
    whole, _ = reference(config, mixture=learned)
    with pytest.raises(Killed):
        start(config, tmp_path, progress, learned)
    facts, output = start(config, tmp_path, mixture=learned)
    assert changed(learned, output) == set()
    assert facts.best_steps == {"fine-tuned": 0}
    assert [replace(step, flops=None) for step in facts.history] == list(whole.history)  # counted over all trainings
    assert facts.warnings[0].startswith(
        "fine-tuned: no evaluation on the validation split was better than at the start"
    )


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    write_whole(path, "[1]")

    def cut(self: Path, text: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(text[:1])
        raise Killed

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(Killed):
        write_whole(path, "[2]")
    assert path.read_text() == "[1]"


def test_what_was_trained_is_not_trained_again(train_alone: TrainAlone, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned"):
            seen.append(done)
            if len(seen) == 5:
                raise Killed

    with pytest.raises(Killed):
        train_alone(CONFIG, tmp_path, progress)
    train_alone(CONFIG, tmp_path, progress)
    assert seen == [1, 2, 3, 4, 5, 5, 6]
    train_alone(CONFIG, tmp_path, progress)
    assert seen == [1, 2, 3, 4, 5, 5, 6]


# What ends a phase


def test_a_phase_that_fails_leaves_the_model_as_it_was_lent(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr("dense2moe.upcycle.training.trainer.run_with_prompt", fail)
    model = load_model(mixture_checkpoint, torch.float32)
    experts: list[Any] = [module.experts for module in model.modules() if hasattr(module, "experts")]
    activations = [each.act_fn for each in experts]
    settings = CONFIG.model_copy(update={"train": "router", "expert_dropout": 0.5, "steps": 1})
    ids, domains = torch.zeros(4, BLOCK, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Killed):
        run_phase(
            model,
            None,
            Phase(
                "m",
                0,
                settings,
                Examples.of_blocks(ids, domains),
                Examples.of_blocks(ids, domains),
                1,
                0,
                1,
                (0, 1),
                "float32",
                0,
            ),
            tmp_path,
            quiet,
        )
    assert [(name, module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks] == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [each.act_fn for each in experts] == activations
    assert model.config.use_cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def computed() -> list[torch.Tensor]:
    """All that is kept with the graph that computed it."""
    return [each for each in gc.get_objects() if type(each) is torch.Tensor and each.grad_fn is not None]


@pytest.mark.parametrize("recomputes", [False, True])
def test_between_steps_nothing_of_a_step_is_kept(recomputes: bool, train_alone: TrainAlone) -> None:
    kept: list[tuple[int, ...]] = []
    before = computed()  # by a test before this one

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned"):
            kept.extend(tuple(each.shape) for each in computed() if not any(each is other for other in before))

    train_alone(CONFIG.model_copy(update={"steps": 2, "gradient_checkpointing": recomputes}), progress=progress)
    assert kept == []


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_backward_pass_keeps_no_more_of_routers_than_the_forward_pass(
    recomputes: bool, train_alone: TrainAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    backward = Accelerator.backward
    before = computed()  # by a test before this one

    def count(*arguments: Any, **keywords: Any) -> None:
        backward(*arguments, **keywords)
        shapes = [tuple(each.shape) for each in computed() if not any(each is other for other in before)]
        kept.append(shapes.count((CONFIG.batch_size * BLOCK, 4)))

    monkeypatch.setattr(Accelerator, "backward", count)
    train_alone(CONFIG.model_copy(update={"steps": 2, "gradient_checkpointing": recomputes}))
    assert kept == [2, 2]  # of two layers


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (TrainingPhase(train="last-3"), "finetune.train is last-3; it must be at most last-2, the layers of the model"),
        (
            TrainingPhase(train="experts", routing="by-domain"),
            "finetune: routing is by-domain, the data has 3 domains and a layer 4 experts; the domains must be 2 or "
            "more and divide the experts "
            "evenly; give data.source of kind 'domains'",
        ),
    ],
)
def test_what_a_later_stage_cannot_do_is_told_before_any_work(
    stage: TrainingPhase, message: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dense2moe.upcycle.training.fine_tuning.read_domains", lambda *_: (("a", "b", "c"), torch.zeros(16))
    )
    seen: list[str] = []
    with pytest.raises(UpcycleError) as excinfo:
        start(
            CONFIG.model_copy(update={"stages": (TrainingPhase(), stage)}), progress=lambda what, *_: seen.append(what)
        )
    assert str(excinfo.value) == message
    assert seen == []


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(train_alone: TrainAlone, tmp_path: Path) -> None:
    stages = (TrainingPhase(steps=2), TrainingPhase(steps=4, learning_rate=1e30, router_learning_rate=1e30))
    with pytest.raises(
        UpcycleError, match=r"finetune: the loss of fine-tuned is (nan|inf) at step \d; lower finetune\.learning_rate"
    ):
        train_alone(CONFIG.model_copy(update={"stages": stages}), tmp_path)
    assert (tmp_path / "fine-tuned" / "phase-0" / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_one_line_that_names_the_last_checkpoint(
    error: Exception, train_alone: TrainAlone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def fail(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise error
        return run_with_prompt(*arguments)

    monkeypatch.setattr("dense2moe.upcycle.training.trainer.run_with_prompt", fail)
    with pytest.raises(UpcycleError) as excinfo:
        train_alone(CONFIG, tmp_path)
    assert str(excinfo.value) == (
        "finetune: out of memory while training fine-tuned; raise finetune.gradient_accumulation_steps, set "
        "finetune.gradient_checkpointing, or "
        "lower data.block_size; the last good checkpoint is "
        f"{tmp_path / 'fine-tuned' / 'phase-0' / 'checkpoints' / 'checkpoint-2'}"
    )


@pytest.mark.parametrize(
    ("writer", "error", "said"),
    [
        (
            "dense2moe.upcycle.training.resumable.write_tensors",
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "No space left on device",
        ),
        (
            "torch.save",
            RuntimeError(
                "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/1: file write "
                "failed"
            ),
            "a file cannot be written",
        ),
    ],
)
def test_a_full_disk_is_told_as_one_and_keeps_the_checkpoint_before(
    writer: str,
    error: Exception,
    said: str,
    train_alone: TrainAlone,
    reference: TrainAlone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, untouched = reference(CONFIG)

    def full(*_: Any, **__: Any) -> None:
        raise error

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 3:
            monkeypatch.setattr(writer, full)

    with pytest.raises(OSError, match=said):
        train_alone(CONFIG, tmp_path, progress)
    monkeypatch.undo()
    assert changed(untouched, train_alone(CONFIG, tmp_path)[1]) == set()


def test_a_batch_that_accumulation_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="batch_size is 4; it must be a multiple of gradient_accumulation_steps, which is 3"
    ):
        FinetuneConfig(batch_size=4, gradient_accumulation_steps=3)


def test_tensorboards_events_hold_losses_and_layers(start: Start) -> None:
    facts, output = start(CONFIG.model_copy(update={"tensorboard": True, "steps": 2}))
    written = b"".join(file.read_bytes() for file in (output / "tensorboard").iterdir())
    for tag in (
        b"train_loss",
        b"validation_loss",
        b"learning_rate",
        b"layer_1/largest_load",
        b"layer_0/entropy",
        b"layer_1/cosine",
    ):
        assert tag in written
    assert facts.num_steps == {"fine-tuned": 2}


def test_without_tensorboards_writer_a_run_is_refused_before_any_work(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UpcycleError) as excinfo:
        start(CONFIG.model_copy(update={"tensorboard": True}))
    assert str(excinfo.value) == (
        "finetune.tensorboard is true and tensorboardX is not installed; install it (pip install "
        "'dense2moe[tensorboard]'), or set it to false"
    )
