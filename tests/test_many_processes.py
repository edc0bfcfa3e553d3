"""Several processes train as one does, with FSDP or without, and resume each other's runs."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import fork, launch
from training_runs import (
    CONFIG,
    Killed,
    Start,
    changed,
    make_biased,
    make_data,
    make_start,
    read_biases,
    weights,
)
from worker_jobs import KILLED, train

from dense2moe.upcycle.training.config import Distillation, TrainingPhase
from dense2moe.upcycle.training.history import Step, read_history
from dense2moe.upcycle.training.prompt import read_prompt

data, start, biased = make_data, make_start, make_biased  # fixtures


# Many processes

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def share(num_processes: int, *arguments: Any, killed_at: int | None = None, **variables: str) -> None:
    """Fine-tune in processes of one group, up to the step at which they are killed, if any."""
    said = Path(arguments[3]).parent / "said.txt"
    codes = launch(num_processes, train, *arguments, killed_at, said=said, environment=variables)
    assert set(codes) == {0} if killed_at is None else KILLED in codes, said.read_text(encoding="utf-8")[-3000:]


def assert_same_losses(ours: tuple[Step, ...], theirs: tuple[Step, ...]) -> None:
    """But for sums in another order, a few steps of AdamW long."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.model, one.step, one.num_tokens) == (other.model, other.step, other.num_tokens)
        for name in ("train_loss", "balance_loss", "z_loss", "distillation_loss", "validation_loss"):
            expected, found = getattr(one, name), getattr(other, name)
            assert found == expected or found == pytest.approx(expected, rel=1e-4), (one.step, name)


def test_two_processes_have_the_losses_and_the_biases_of_one_at_the_same_global_batch(
    dense_checkpoint: Path, biased: Path, data: Path, tmp_path: Path
) -> None:
    changes = {
        "steps": 4,
        "z_coefficient": 0.01,
        "balance_coefficient": 0.1,
        "control": True,
        "gradient_accumulation_steps": 2,
    }
    settings = CONFIG.model_copy(update=changes).model_dump_json()
    histories = {}
    for count in (1, 2):
        place = tmp_path / str(count)
        output = place / "output"
        output.mkdir(parents=True)
        share(count, dense_checkpoint, biased, data, output, place / "scratch", settings)
        assert len(list((place / "scratch").glob(f"rank-*-of-{count}"))) == count
        histories[count] = [
            step for step in read_history(output / "history.jsonl") if step.model != "dense, same FLOPs"
        ]
    assert len(histories[1]) == 2 * (4 + 3)
    assert_same_losses(histories[1], histories[2])
    assert torch.equal(read_biases(tmp_path / "1" / "output"), read_biases(tmp_path / "2" / "output"))
    assert read_biases(tmp_path / "2" / "output").any()


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_killed_run_is_taken_up_by_another_number_of_processes(
    fsdp: bool, dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, start: Start, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"stages": (TrainingPhase(), TrainingPhase(train="lora", steps=4))})
    whole, _ = start(config)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise Killed

    scratch, output = tmp_path / "scratch", tmp_path / "output"
    output.mkdir()
    with pytest.raises(Killed):
        start(config, scratch, progress)
    share(
        2,
        dense_checkpoint,
        mixture_checkpoint,
        data,
        output,
        scratch,
        config.model_dump_json(),
        **(FSDP if fsdp else {}),
    )
    assert_same_losses(whole.history, read_history(output / "history.jsonl"))


def assert_same_weights(ours: Path, theirs: Path, rate: float = 1e-3) -> None:
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        # AdamW divides a gradient by its own size: where it is about zero, rounding is a step of its own, a hundredth
        # of the rate at most.
        assert torch.allclose(tensor, other[name], atol=max(1e-4, 1e-2 * rate)), (
            name,
            float((tensor - other[name]).abs().max()),
        )


@pytest.mark.parametrize(
    ("settings", "num_steps", "best_step"),
    [
        (
            {
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "max_grad_norm": 0.05,
                "expert_learning_rate": 5e-3,
                "balance_coefficient": 0.1,
                "z_coefficient": 0.01,
                "distillation": Distillation(weight=0.5),
            },
            4,
            4,
        ),
        (
            {
                "learning_rate": 1e-2,
                "stages": (TrainingPhase(train="lora", steps=2), TrainingPhase(train="prompt", steps=2)),
            },
            4,
            4,
        ),
        # Its second look is worse, so the weights of the first are restored.
        ({"learning_rate": 0.3, "schedule": "constant", "eval_steps": 1, "patience": 1, "max_grad_norm": 0.05}, 2, 1),
    ],
)
def test_two_processes_that_share_a_model_by_fsdp_end_as_one_and_hold_half_each(
    settings: dict[str, Any],
    num_steps: int,
    best_step: int,
    dense_checkpoint: Path,
    mixture_checkpoint: Path,
    data: Path,
    start: Start,
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"steps": 4} | settings)
    facts, alone = start(config)
    assert (facts.num_steps, facts.best_steps) == ({"fine-tuned": num_steps}, {"fine-tuned": best_step})
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    share(2, dense_checkpoint, mixture_checkpoint, data, output, scratch, config.model_dump_json(), **FSDP)
    shared = read_history(output / "history.jsonl")
    assert_same_losses(facts.history, shared)
    for ours, theirs in zip(facts.history, shared, strict=True):
        assert [layer.load for layer in theirs.layers] == [pytest.approx(layer.load, abs=1e-6) for layer in ours.layers]
        assert [layer.cosine for layer in theirs.layers] == [
            pytest.approx(layer.cosine, abs=1e-5) for layer in ours.layers
        ]
    assert_same_weights(alone, output, config.learning_rate)
    prompts = [prompt for each in (alone, output) if (prompt := read_prompt(each)) is not None]
    assert not prompts or torch.allclose(prompts[0], prompts[1], atol=1e-4)
    counts = [json.loads((scratch / f"counts-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert all(0.4 < first / (first + second) < 0.6 for first, second in zip(*counts, strict=True))
    if not config.stages:
        assert [first + second for first, second in zip(*counts, strict=True)] == [
            sum(w.numel() for w in weights(output).values())
        ] * 4


def test_a_run_under_fsdp_that_is_killed_is_taken_up_by_fsdp_and_by_one_process(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, start: Start, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"steps": 4, "eval_steps": 1, "train": "experts"})
    whole, untouched = start(config)
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    arguments = (dense_checkpoint, mixture_checkpoint, data, output, scratch, config.model_dump_json())
    share(2, *arguments, killed_at=2, **FSDP)
    share(2, *arguments, killed_at=4, **FSDP)
    assert (scratch / "fine-tuned" / "phase-0" / "checkpoints" / "checkpoint-3" / "history.jsonl").is_file()
    taken_up, alone = start(config, scratch)
    assert_same_losses(whole.history, taken_up.history)
    assert_same_weights(untouched, alone)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_for_real_is_taken_up(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    settings = CONFIG.model_copy(update={"steps": 16, "eval_steps": 2}).model_dump_json()
    outputs = []
    for kill in (False, True):
        place = tmp_path / str(kill)
        (place / "output").mkdir(parents=True)
        arguments = (dense_checkpoint, mixture_checkpoint, data, place / "output", place / "scratch", settings)
        if kill:
            process = fork(train, *arguments, said=place / "said.txt")
            checkpoints = place / "scratch" / "fine-tuned" / "phase-0" / "checkpoints"
            deadline = time.monotonic() + 300
            while (
                not any(checkpoints.glob("checkpoint-*/history.jsonl"))
                and time.monotonic() < deadline
                and process.is_alive()
            ):
                time.sleep(0.02)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, "it had ended before the kill"
        process = fork(train, *arguments, said=place / "said.txt")
        process.join(300)
        assert process.exitcode == 0, (place / "said.txt").read_text(encoding="utf-8")
        outputs.append(place / "output")
    assert changed(*outputs) == set()
    assert json.loads((outputs[0] / "config.json").read_text()) == json.loads((outputs[1] / "config.json").read_text())
