"""Stages follow each other, a killed run ends as if it had not been killed, and what stops one is told in a line."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from programs import fork, launch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from worker_jobs import KILLED, train

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules, selection_biases
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.durable import is_kept
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.training.config import Distillation, FinetuneConfig, TrainingStage
from dense2moe.upcycle.training.evaluation import held_out_loss
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.fine_tuning import draw_order, finetune
from dense2moe.upcycle.training.history import Step, read_history, write_history, write_whole
from dense2moe.upcycle.training.objective import distillation_loss, next_token_loss
from dense2moe.upcycle.training.prompt import read_prompt
from dense2moe.upcycle.training.trainable import parameter_groups
from dense2moe.upcycle.training.trainer import Stage, _StageTrainer, run_stage, schedule_share
from tests.conftest import MakeDense

BLOCK = 16
CONFIG = FinetuneConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    router_learning_rate=1e-2,
    warmup_steps=1,
    eval_steps=2,
    patience=99,
    precision="float32",
    control=False,
)
ROOT = Path(__file__).parent.parent


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def data(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains: letters, and digits."""
    directory = tmp_path_factory.mktemp("data")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 120), ("validation", 20), ("test", 20)):
        for domain, alphabet in (("letters", "abcdefgh"), ("digits", "01234567")):
            words = [" ".join(alphabet[i] * 2 for i in torch.randint(8, (12,), generator=draw)) for _ in range(count)]
            (directory / f"{domain}-{split}.txt").write_text("\n".join(words), encoding="utf-8")
    sources = {
        domain: TextData(
            kind="text",
            train=(f"{domain}-train.txt",),
            validation=(f"{domain}-validation.txt",),
            test=(f"{domain}-test.txt",),
            separator="\n",
        )
        for domain in ("letters", "digits")
    }
    config = DataConfig.model_validate({"source": {"kind": "domains", "domains": sources}, "block_size": BLOCK})
    prepare_data(dense_checkpoint, directory, config, directory, quiet)
    return directory


Start = Callable[..., tuple[FinetuneFacts, Path]]


@pytest.fixture
def start(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    def start(
        config: FinetuneConfig, scratch: Path | None = None, progress: Any = quiet, mixture: Path = mixture_checkpoint
    ) -> tuple[FinetuneFacts, Path]:
        output = tmp_path_factory.mktemp("output")
        scratch = scratch or tmp_path_factory.mktemp("scratch")
        return finetune(dense_checkpoint, mixture, data, output, config, 0, progress, scratch), output

    return start


BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def biased(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture like `mixture_checkpoint` whose gates have a selection bias. Shared: read only."""
    output = tmp_path_factory.mktemp("biased")
    experts, router = ExpertsConfig(noise=0.5), RouterConfig(logit_std=2.0)
    upcycle(
        dense_checkpoint,
        output,
        UpcycleConfig(target="glm4_moe", num_experts=4, experts=experts, router=router),
        0,
        quiet,
    )
    return output


def read_biases(directory: Path) -> torch.Tensor:
    """The biases of both layers [2, 4]."""
    found = weights(directory)
    return torch.stack([found[BIAS.format(layer)] for layer in (0, 1)])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


# Stages


def test_stages_follow_each_other_and_count_on(start: Start, mixture_checkpoint: Path) -> None:
    stages = (
        TrainingStage(train="router", steps=2),
        TrainingStage(train="experts", steps=4, schedule="constant", learning_rate=5e-4),
    )
    facts, output = start(CONFIG.model_copy(update={"stages": stages}))
    logged = [step for step in facts.history if step.train_loss is not None]
    assert [(step.stage, step.step) for step in logged] == [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert [step.num_tokens for step in logged] == [step * 4 * BLOCK for step in range(1, 7)]
    assert facts.num_steps == {"fine-tuned": 6}
    assert changed(mixture_checkpoint, output) == {name for name in weights(output) if "block_sparse_moe" in name}


def test_a_stage_begins_with_the_best_weights_of_the_one_before(start: Start) -> None:
    one = start(CONFIG.model_copy(update={"steps": 4}))
    both = start(
        CONFIG.model_copy(
            update={
                "stages": (
                    TrainingStage(steps=4),
                    TrainingStage(steps=2, learning_rate=1e-20, router_learning_rate=1e-20),
                )
            }
        )
    )
    assert one[0].best_steps == {"fine-tuned": 4}
    assert both[0].best_steps == {"fine-tuned": 4}
    # float32 weights do not move by 1e-20.
    assert changed(one[1], both[1]) == set()


def test_experts_of_their_own_domains_learn_those_alone(start: Start, mixture_checkpoint: Path) -> None:
    stage = TrainingStage(train="experts", routing="by-domain")
    facts, output = start(CONFIG.model_copy(update={"stages": (stage,)}))
    assert changed(mixture_checkpoint, output) == {name for name in weights(output) if ".experts." in name}
    assert all(step.balance_loss is None for step in facts.history)


def test_by_domain_sends_a_batch_of_one_domain_to_its_experts_alone(
    start: Start, mixture_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = load_file(data / "train.safetensors")
    only_digits = torch.nonzero(blocks["domains"] == 1).flatten()
    monkeypatch.setattr(
        "dense2moe.upcycle.training.fine_tuning.draw_order", lambda _, count, __: only_digits.repeat(count)[:count]
    )
    _, output = start(CONFIG.model_copy(update={"stages": (TrainingStage(train="experts", routing="by-domain"),)}))
    assert changed(mixture_checkpoint, output) == {
        name for name in weights(output) if ".experts.2." in name or ".experts.3." in name
    }


def test_a_stage_by_domain_is_watched_and_judged_as_it_is_trained(
    start: Start, mixture_checkpoint: Path, data: Path
) -> None:
    """With rates too small to change a weight: the validation loss is that of each domain through its own experts."""
    stage = TrainingStage(train="experts", routing="by-domain", steps=2, learning_rate=1e-20)
    facts, _ = start(CONFIG.model_copy(update={"stages": (stage,)}))
    model = load_model(mixture_checkpoint, torch.float32)
    stored = load_file(data / "validation.safetensors")
    losses = []
    for domain in (0, 1):
        blocks = stored["input_ids"][stored["domains"] == domain].long()
        index = torch.tensor([2 * domain, 2 * domain + 1]).expand(blocks.numel(), 2)
        handles = [
            router.register_forward_hook(
                lambda _, __, output, index=index: (output[0], torch.full(index.shape, 0.5), index)
            )
            for router in router_modules(model)
        ]
        with torch.no_grad():
            losses += [next_token_loss(model(blocks).logits, blocks)] * len(blocks)
        for handle in handles:
            handle.remove()
    looked = [step.validation_loss for step in facts.history if step.validation_loss is not None]
    assert looked == pytest.approx([float(torch.stack(losses).mean())] * 2, rel=1e-5)
    last = [step for step in facts.history if step.layers][-1]
    # Four blocks of one or the other domain, whose tokens go to both of its experts.
    assert all(layer.load[0] == layer.load[1] and layer.load[2] == layer.load[3] for layer in last.layers)
    assert all(load in (0.0, 0.125, 0.25, 0.375, 0.5) for layer in last.layers for load in layer.load)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM"]
)
@pytest.mark.parametrize("granular", [False, True])
def test_copies_compute_the_dense_function_whatever_domain_chooses_them(
    architecture: str, granular: bool, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(architecture=architecture)
    experts = ExpertsConfig(kind="granular", granularity=2) if granular else ExpertsConfig()
    upcycle(
        dense,
        tmp_path,
        UpcycleConfig(num_experts=8, num_experts_per_tok=2, experts=experts, router=RouterConfig(logit_std=1.0)),
        0,
        quiet,
    )
    ids = torch.randint(300, (4, BLOCK), generator=torch.Generator().manual_seed(0))
    stage = TrainingStage(train="experts", routing="by-domain", learning_rate=1e-20).model_dump(exclude_none=True)
    settings = CONFIG.model_copy(update={"steps": 1, **stage})
    domains = torch.tensor([0, 1, 1, 0])
    made = load_model(tmp_path, torch.float32)
    result = run_stage(
        made,
        None,
        Stage("m", 0, settings, ids, domains, 2, ids, domains, 0, 1, (0, 1), "float32", 0),
        tmp_path / "c",
        quiet,
    )
    assert result.history[-1].validation_loss == pytest.approx(
        held_out_loss(load_model(dense, torch.float32), ids), rel=1e-5
    )


def test_one_domain_has_no_experts_of_its_own(dense_checkpoint: Path, mixture_checkpoint: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} some words and more of them " * 20, encoding="utf-8")
    source = TextData(kind="text", train=("train.txt",), validation=("validation.txt",), test=("test.txt",))
    prepare_data(dense_checkpoint, tmp_path, DataConfig(source=source, block_size=BLOCK), tmp_path, quiet)
    config = CONFIG.model_copy(update={"stages": (TrainingStage(train="experts", routing="by-domain"),)})
    with pytest.raises(UpcycleError) as excinfo:
        finetune(
            dense_checkpoint, mixture_checkpoint, tmp_path, tmp_path / "out", config, 0, quiet, tmp_path / "scratch"
        )
    assert str(excinfo.value) == (
        "finetune: routing is by-domain, the data has 1 domains and a layer 4 experts; the domains must be 2 or more "
        "and divide the experts evenly; "
        "give data.source of kind 'domains'"
    )


def test_low_rank_updates_are_merged_into_a_checkpoint_like_any_other(start: Start, mixture_checkpoint: Path) -> None:
    facts, output = start(CONFIG.model_copy(update={"train": "lora", "learning_rate": 1e-2}))
    assert weights(output).keys() == weights(mixture_checkpoint).keys()
    assert changed(mixture_checkpoint, output) == {
        name for name in weights(output) if "proj" in name or "block_sparse_moe" in name
    }
    losses = [step.train_loss for step in facts.history if step.train_loss is not None]
    assert losses[-1] < losses[0] - 0.05
    assert facts.evaluations["fine-tuned"].loss < facts.evaluations["upcycled"].loss


def test_computing_the_inner_values_twice_changes_nothing(start: Start) -> None:
    plain, again = (start(CONFIG.model_copy(update={"gradient_checkpointing": value}))[1] for value in (False, True))
    assert changed(plain, again) == set()


def test_the_load_is_that_of_the_whole_batch_however_many_parts_it_has(start: Start) -> None:
    histories = [
        start(CONFIG.model_copy(update={"steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": parts}))[
            0
        ].history
        for parts in (1, 2, 4)
    ]
    whole, *others = [[layer.load for step in history for layer in step.layers] for history in histories]
    assert len(whole) == 2
    for loads in others:
        assert loads == [pytest.approx(load, abs=1e-6) for load in whole]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"balance_coefficient": 0.0},
        {"gradient_checkpointing": True},
        {"train": "prompt"},
        {"precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("kind", ["mixture_checkpoint", "biased"])
def test_losses_and_gradients_are_those_of_the_whole_batch_however_many_parts_it_has(
    kind: str, change: dict[str, Any], start: Start, request: pytest.FixtureRequest
) -> None:
    steps, gradients = [], []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.append(
            [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        )

    handle = register_optimizer_step_pre_hook(take)
    try:
        for parts in (1, 2, 4):
            settings = {
                "steps": 1,
                "warmup_steps": 0,
                "balance_coefficient": 0.5,
                "z_coefficient": 0.1,
                "max_grad_norm": 1e9,
            } | change
            config = CONFIG.model_copy(update=settings | {"gradient_accumulation_steps": parts})
            facts, _ = start(config, mixture=request.getfixturevalue(kind))
            steps += [step for step in facts.history if step.train_loss is not None]
    finally:
        handle.remove()
    exact = change.get("precision") is None
    for step, found in zip(steps[1:], gradients[1:], strict=True):
        for name in ("train_loss", "balance_loss", "z_loss"):
            assert getattr(step, name) == pytest.approx(getattr(steps[0], name), rel=1e-5 if exact else 1e-3), name
        for ours, whole in zip(found, gradients[0], strict=True):
            # Sums in another order; bfloat16 has 8 significant bits.
            assert float((ours - whole).norm() / whole.norm()) < (1e-4 if exact else 3e-2)


def test_experts_drop_the_same_activations_in_the_pass_that_counts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted ahead is what the parts then measure, bit for bit."""
    measured: list[torch.Tensor] = []
    plain = _StageTrainer._measure_load

    def measure(trainer: Any, biases: Any) -> torch.Tensor:
        measured.append(plain(trainer, biases))
        return measured[-1]

    monkeypatch.setattr(_StageTrainer, "_measure_load", measure)
    start(
        CONFIG.model_copy(
            update={"steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 2, "expert_dropout": 0.5}
        )
    )
    ahead, parts = measured[:2], measured[2:]
    assert [load.tolist() for load in parts] == [load.tolist() for load in ahead]
    assert ahead[0].tolist() != ahead[1].tolist()


def test_the_last_weights_are_looked_at_too(start: Start) -> None:
    facts, _ = start(CONFIG.model_copy(update={"steps": 5, "eval_steps": 3}))
    assert [step.step for step in facts.history if step.validation_loss is not None] == [0, 3, 5]


# Objectives and rates


def test_the_divergence_of_two_tokens_is_as_by_hand() -> None:
    # Teacher (3/4, 1/4) against student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2); the last position has no next token.
    teacher = torch.tensor([[[math.log(3.0), 0.0], [50.0, 0.0]]])
    student = torch.zeros(1, 2, 2, requires_grad=True)
    loss = distillation_loss(student, teacher, 1.0)
    assert float(loss.detach()) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25, 0.0, 0.0])


def test_the_temperature_softens_both_and_its_square_keeps_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    p, q = (F.softmax(logits[:, :-1] / 3, -1) for logits in (teacher, student))
    assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(
        float(9 * (p * (p / q).log()).sum(-1).mean()), rel=1e-5
    )


def test_distillation_alone_pulls_towards_the_parent(
    start: Start, dense_checkpoint: Path, mixture_checkpoint: Path, data: Path
) -> None:
    facts, output = start(
        CONFIG.model_copy(
            update={
                "distillation": Distillation(weight=1.0),
                "balance_coefficient": 0.0,
                "learning_rate": 3e-3,
                "steps": 40,
            }
        )
    )
    blocks = read_blocks(data, "test")[:16]
    with torch.no_grad():
        parent, before, after = (
            load_model(each, torch.float32)(blocks).logits for each in (dense_checkpoint, mixture_checkpoint, output)
        )
    far, near = (float(distillation_loss(logits, parent, 1.0)) for logits in (before, after))
    assert near < 0.6 * far
    assert len([step for step in facts.history if step.distillation_loss is not None]) == 40


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5))]),
        ("inverse-sqrt", [0.5, 1.0, 1.0, math.sqrt(2 / 3), math.sqrt(2 / 4), math.sqrt(2 / 5)]),
    ],
)
def test_the_rates_of_six_steps_with_two_of_warm_up(schedule: str, expected: list[float]) -> None:
    assert [schedule_share(schedule, 2, 6, step) for step in range(6)] == pytest.approx(expected)


# Killed, and taken up again


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("at", "mixture"),
    [*((at, "mixture_checkpoint") for at in (1, 2, 3, 5, 6, 7, 9, 10, 12)), *((at, "biased") for at in (3, 7, 12))],
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    at: int, mixture: str, start: Start, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    start = partial(start, mixture=request.getfixturevalue(mixture))
    config = CONFIG.model_copy(
        update={"stages": (TrainingStage(train="router", steps=4), TrainingStage(steps=8)), "expert_dropout": 0.1}
    )
    whole, untouched = start(config)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == at:
            raise _Killed

    with pytest.raises(_Killed):
        start(config, tmp_path, progress)
    taken_up, output = start(config, tmp_path)
    assert changed(untouched, output) == set()
    assert taken_up.history == whole.history
    assert taken_up.best_steps == whole.best_steps
    if mixture == "biased":
        assert read_biases(output).abs().amin(-1).max() > 0


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_stage_that_was_killed_before_its_first_checkpoint_begins_with_the_same_random_numbers(
    train: str, start: Start, tmp_path: Path
) -> None:
    stages = (TrainingStage(train="router", steps=4), TrainingStage(train=train, steps=4))
    config = CONFIG.model_copy(update={"stages": stages, "expert_dropout": 0.1})
    _, untouched = start(config)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise _Killed

    with pytest.raises(_Killed):
        start(config, tmp_path, progress)
    assert changed(untouched, start(config, tmp_path)[1]) == set()


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_seed_alone_decides_and_the_generators_of_the_process_stay_where_they_are(train: str, start: Start) -> None:
    config = CONFIG.model_copy(update={"train": train, "expert_dropout": 0.1, "steps": 2})
    outputs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
            outputs.append(start(config)[1])
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]
    assert changed(*outputs) == set()


@pytest.mark.parametrize("patience", [1, 99])
@pytest.mark.parametrize("cut", ["record", "weights"])
def test_a_run_killed_between_its_last_checkpoint_and_its_end_does_not_train_on(
    cut: str, patience: int, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    whole, untouched = start(config)
    assert whole.num_steps == {"fine-tuned": 1 if patience == 1 else 3}
    plain = os.replace

    def replace(fresh: Path, path: Path) -> None:
        if Path(path).match("trained/kept.json"):
            raise _Killed
        plain(fresh, path)

    def save(*_: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        if cut == "record":
            patch.setattr(os, "replace", replace)
        else:
            patch.setattr("dense2moe.upcycle.training.fine_tuning._save", save)
        start(config, tmp_path)
    stage = tmp_path / "fine-tuned" / "stage-0"
    assert not is_kept(stage / "trained")
    assert any((stage / "checkpoints").iterdir())
    seen: list[int] = []
    facts, output = start(
        config, tmp_path, lambda what, done, _: seen.append(done) if what.startswith("training fine-tuned") else None
    )
    assert seen == []
    assert changed(untouched, output) == set()
    assert (facts.num_steps, facts.best_steps, facts.history) == (whole.num_steps, whole.best_steps, whole.history)


def test_checkpoints_that_a_kill_left_are_not_in_what_is_written(start: Start, tmp_path: Path) -> None:
    start(CONFIG, tmp_path)
    left = tmp_path / "fine-tuned" / "stage-0" / "checkpoints" / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "optimizer.pt").touch()
    _, output = start(CONFIG, tmp_path)
    assert not (output / "checkpoints").exists()
    assert not left.exists()


def test_the_checkpoint_before_stays_until_the_next_is_whole(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def write(path: Path, history: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise _Killed
        write_history(path, history)

    monkeypatch.setattr("dense2moe.upcycle.training.trainer.write_history", write)
    with pytest.raises(_Killed):
        start(CONFIG, tmp_path)
    checkpoints = tmp_path / "fine-tuned" / "stage-0" / "checkpoints"
    assert (checkpoints / "checkpoint-2" / "history.jsonl").is_file()
    assert (checkpoints / "checkpoint-4" / "optimizer.pt").is_file()


def test_only_the_best_checkpoint_and_the_latest_are_kept(start: Start, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise _Killed

    # No look is better than the start.
    with pytest.raises(_Killed):
        start(
            CONFIG.model_copy(update={"learning_rate": 1e-20, "router_learning_rate": 1e-20, "eval_steps": 1}),
            tmp_path,
            progress,
        )
    kept = (tmp_path / "fine-tuned" / "stage-0" / "checkpoints").iterdir()
    assert {folder.name for folder in kept} == {"start", "checkpoint-4"}


def test_the_start_is_forgotten_when_a_look_is_better(start: Start, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise _Killed

    with pytest.raises(_Killed):
        start(CONFIG.model_copy(update={"eval_steps": 1}), tmp_path, progress)
    kept = {folder.name for folder in (tmp_path / "fine-tuned" / "stage-0" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4"}


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_killed_run_that_only_harms_ends_with_the_weights_of_the_start(
    at: int, train: str, start: Start, tmp_path: Path
) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == at:
            raise _Killed

    _, learned = start(CONFIG.model_copy(update={"steps": 60, "learning_rate": 1e-2}))
    config = CONFIG.model_copy(
        update={"steps": 4, "learning_rate": 3.0, "router_learning_rate": 3.0, "train": train, "lora_alpha": 64}
    )
    whole, _ = start(config, mixture=learned)
    with pytest.raises(_Killed):
        start(config, tmp_path, progress, learned)
    facts, output = start(config, tmp_path, mixture=learned)
    assert changed(learned, output) == set()
    assert facts.best_steps == {"fine-tuned": 0}
    assert facts.history == whole.history
    assert facts.warnings[0].startswith("fine-tuned: no look at the validation split was better than the start")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    write_whole(path, "[1]")

    def cut(self: Path, text: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(text[:1])
        raise _Killed

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(_Killed):
        write_whole(path, "[2]")
    assert path.read_text() == "[1]"


def test_what_was_trained_is_not_trained_again(start: Start, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned"):
            seen.append(done)
            if len(seen) == 5:
                raise _Killed

    with pytest.raises(_Killed):
        start(CONFIG, tmp_path, progress)
    start(CONFIG, tmp_path, progress)
    assert seen == [1, 2, 3, 4, 5, 5, 6]
    start(CONFIG, tmp_path, progress)
    assert seen == [1, 2, 3, 4, 5, 5, 6]


# What ends a stage


def test_a_stage_that_fails_leaves_the_model_as_it_was_lent(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise _Killed

    monkeypatch.setattr("dense2moe.upcycle.training.trainer.next_token_loss", fail)
    model = load_model(mixture_checkpoint, torch.float32)
    experts: list[Any] = [module.experts for module in model.modules() if hasattr(module, "experts")]
    activations = [each.act_fn for each in experts]
    settings = CONFIG.model_copy(update={"train": "router", "expert_dropout": 0.5, "steps": 1})
    ids, domains = torch.zeros(4, BLOCK, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(_Killed):
        run_stage(
            model,
            None,
            Stage("m", 0, settings, ids, domains, 1, ids, domains, 0, 1, (0, 1), "float32", 0),
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
def test_between_steps_nothing_of_a_step_is_kept(recomputes: bool, start: Start) -> None:
    kept: list[tuple[int, ...]] = []
    before = computed()  # by a test before this one

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned"):
            kept.extend(tuple(each.shape) for each in computed() if not any(each is other for other in before))

    start(CONFIG.model_copy(update={"steps": 2, "gradient_checkpointing": recomputes}), progress=progress)
    assert kept == []


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_backward_pass_keeps_no_more_of_routers_than_the_forward_pass(
    recomputes: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    backward = Accelerator.backward
    before = computed()  # by a test before this one

    def count(*arguments: Any, **keywords: Any) -> None:
        backward(*arguments, **keywords)
        shapes = [tuple(each.shape) for each in computed() if not any(each is other for other in before)]
        kept.append(shapes.count((CONFIG.batch_size * BLOCK, 4)))

    monkeypatch.setattr(Accelerator, "backward", count)
    start(CONFIG.model_copy(update={"steps": 2, "gradient_checkpointing": recomputes}))
    assert kept == [2, 2]  # of two layers


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (TrainingStage(train="last-3"), "finetune.train is last-3; it must be at most last-2, the layers of the model"),
        (
            TrainingStage(train="experts", routing="by-domain"),
            "finetune: routing is by-domain, the data has 3 domains and a layer 4 experts; the domains must be 2 or "
            "more and divide the experts "
            "evenly; give data.source of kind 'domains'",
        ),
    ],
)
def test_what_a_later_stage_cannot_do_is_told_before_any_work(
    stage: TrainingStage, message: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dense2moe.upcycle.training.fine_tuning.read_domains", lambda *_: (("a", "b", "c"), torch.zeros(16))
    )
    seen: list[str] = []
    with pytest.raises(UpcycleError) as excinfo:
        start(
            CONFIG.model_copy(update={"stages": (TrainingStage(), stage)}), progress=lambda what, *_: seen.append(what)
        )
    assert str(excinfo.value) == message
    assert seen == []


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(start: Start, tmp_path: Path) -> None:
    stages = (TrainingStage(steps=2), TrainingStage(steps=4, learning_rate=1e30, router_learning_rate=1e30))
    with pytest.raises(
        UpcycleError, match=r"finetune: the loss of fine-tuned is (nan|inf) at step \d; lower finetune\.learning_rate"
    ):
        start(CONFIG.model_copy(update={"stages": stages}), tmp_path)
    assert (tmp_path / "fine-tuned" / "stage-0" / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_one_line_that_names_the_last_checkpoint(
    error: Exception, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    from dense2moe.upcycle.training import trainer

    plain = trainer.next_token_loss

    def fail(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise error
        return plain(*arguments)

    monkeypatch.setattr("dense2moe.upcycle.training.trainer.next_token_loss", fail)
    with pytest.raises(UpcycleError) as excinfo:
        start(CONFIG, tmp_path)
    assert str(excinfo.value) == (
        "finetune: out of memory while training fine-tuned; raise finetune.gradient_accumulation_steps, set "
        "finetune.gradient_checkpointing, or "
        "lower data.block_size; the last good checkpoint is "
        f"{tmp_path / 'fine-tuned' / 'stage-0' / 'checkpoints' / 'checkpoint-2'}"
    )


@pytest.mark.parametrize(
    ("writer", "error", "said"),
    [
        (
            "dense2moe.upcycle.training.trainer.write_tensors",
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
    writer: str, error: Exception, said: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, untouched = start(CONFIG)

    def full(*_: Any, **__: Any) -> None:
        raise error

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 3:
            monkeypatch.setattr(writer, full)

    with pytest.raises(OSError, match=said):
        start(CONFIG, tmp_path, progress)
    monkeypatch.undo()
    assert changed(untouched, start(CONFIG, tmp_path)[1]) == set()


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


# Domains


def test_routing_differs_between_domains_more_than_within_one(start: Start) -> None:
    stages = (
        TrainingStage(train="experts", routing="by-domain", steps=20),
        TrainingStage(train="router", steps=40, balance_coefficient=0.0),
    )
    facts, _ = start(
        CONFIG.model_copy(
            update={"stages": stages, "eval_steps": 20, "learning_rate": 3e-3, "router_learning_rate": 3e-2}
        )
    )
    assert facts.domains is not None
    assert set(facts.domains.loads) == {"letters", "digits"}
    assert all(sum(load) == pytest.approx(1, abs=1e-5) for layers in facts.domains.loads.values() for load in layers)
    assert all(
        between > 2 * within for between, within in zip(facts.domains.between, facts.domains.within, strict=True)
    )


# Gates with a selection bias


def first_counts(mixture: Path, data: Path, num_blocks: int) -> torch.Tensor:
    """How many of the first blocks' tokens each expert of both layers gets, as the gates say themselves.

    Int64 [2, 4].
    """
    model, counts = load_model(mixture, torch.float32), []

    def count(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        counts.append(F.one_hot(output[2].flatten(), 4).sum(0))

    handles = [router.register_forward_hook(count) for router in router_modules(model)]
    train = read_blocks(data, "train")
    with torch.no_grad():
        model(train[list(draw_order(len(train), num_blocks, 0))])
    for handle in handles:
        handle.remove()
    return torch.stack(counts)


@pytest.mark.parametrize("train", ["all", "experts", "router", "lora"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_moves_each_bias_by_the_rate_against_the_load_of_all_its_parts(
    train: str, parts: int, start: Start, biased: Path, data: Path
) -> None:
    still = {"learning_rate": 1e-20, "router_learning_rate": 1e-20, "warmup_steps": 0, "steps": 1}
    _, output = start(
        CONFIG.model_copy(update=still | {"train": train, "gradient_accumulation_steps": parts}), mixture=biased
    )
    counts = first_counts(biased, data, 4)
    assert int(counts.sum()) == 2 * 4 * BLOCK * 2
    # the mean is 4 * BLOCK * 2 / 4
    expected = [[1e-3 * ((count < 2 * BLOCK) - (count > 2 * BLOCK)) for count in layer] for layer in counts.tolist()]
    assert any(value for layer in expected for value in layer)
    assert read_biases(output).flatten().tolist() == pytest.approx([value for layer in expected for value in layer])
    assert read_biases(output).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        ({}, (True, True)),
        ({"bias_update_rate": 0.0}, (False, False)),
        ({"train": "last-1"}, (False, True)),
        ({"train": "experts", "routing": "by-domain"}, (False, False)),
        ({"train": "prompt"}, (False, False)),
    ],
)
def test_a_bias_moves_where_its_router_learns(
    settings: dict[str, Any], moving: tuple[bool, bool], start: Start, biased: Path
) -> None:
    _, output = start(CONFIG.model_copy(update={"steps": 2, **settings}), mixture=biased)
    assert [bool(layer.any()) for layer in read_biases(output)] == list(moving)


def test_no_gradient_and_no_optimizer_reaches_a_bias(biased: Path) -> None:
    model = load_model(biased, torch.float32)
    groups = parameter_groups(model, CONFIG, (0, 1))
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for bias in selection_biases(model):
        assert bias is not None
        assert not bias.requires_grad
        assert id(bias) not in held


def imbalance(facts: FinetuneFacts) -> float:
    """The mean over the last steps and layers of half the sum of the loads' distances from a quarter."""
    last = [layer.load for step in facts.history[-8:] for layer in step.layers]
    return sum(abs(share - 0.25) for load in last for share in load) / 2 / len(last)


def test_an_unbalanced_router_becomes_balanced_by_its_bias_alone(start: Start, biased: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 60, "balance_coefficient": 0.0, "eval_steps": 60})
    without, with_bias = (
        start(config.model_copy(update={"bias_update_rate": rate}), mixture=biased)[0] for rate in (0.0, 2e-2)
    )
    assert imbalance(without) > 0.1
    assert imbalance(with_bias) < 0.6 * imbalance(without)  # 0.52; the load is that of the last steps together


def test_the_best_weights_come_back_with_their_biases(start: Start, biased: Path) -> None:
    """With rates that harm the model from the first step on, the best look is the first.

    Whose biases moved by one step.
    """
    config = CONFIG.model_copy(
        update={
            "steps": 4,
            "eval_steps": 1,
            "patience": 2,
            "learning_rate": 3e-1,
            "schedule": "constant",
            "warmup_steps": 0,
        }
    )
    facts, output = start(config, mixture=biased)
    assert facts.num_steps["fine-tuned"] > facts.best_steps["fine-tuned"] == 1
    assert float(read_biases(output).abs().max()) == pytest.approx(1e-3)


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
            step for step in read_history(output / "history.jsonl") if step.model != "dense, equal time"
        ]
    assert len(histories[1]) == 2 * (4 + 3)
    assert_same_losses(histories[1], histories[2])
    assert torch.equal(read_biases(tmp_path / "1" / "output"), read_biases(tmp_path / "2" / "output"))
    assert read_biases(tmp_path / "2" / "output").any()


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_killed_run_is_taken_up_by_another_number_of_processes(
    fsdp: bool, dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, start: Start, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"stages": (TrainingStage(), TrainingStage(train="lora", steps=4))})
    whole, _ = start(config)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == 5:
            raise _Killed

    scratch, output = tmp_path / "scratch", tmp_path / "output"
    output.mkdir()
    with pytest.raises(_Killed):
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
        assert torch.allclose(tensor, other[name], atol=max(1e-4, 1e-3 * rate)), (
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
                "stages": (TrainingStage(train="lora", steps=2), TrainingStage(train="prompt", steps=2)),
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
    assert (scratch / "fine-tuned" / "stage-0" / "checkpoints" / "checkpoint-3" / "history.jsonl").is_file()
    taken_up, alone = start(config, scratch)
    assert_same_losses(whole.history, taken_up.history)
    assert_same_weights(untouched, alone)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_for_real_is_taken_up(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    settings = CONFIG.model_copy(update={"steps": 40, "eval_steps": 4}).model_dump_json()
    outputs = []
    for kill in (False, True):
        place = tmp_path / str(kill)
        (place / "output").mkdir(parents=True)
        arguments = (dense_checkpoint, mixture_checkpoint, data, place / "output", place / "scratch", settings)
        if kill:
            process = fork(train, *arguments, said=place / "said.txt")
            checkpoints = place / "scratch" / "fine-tuned" / "stage-0" / "checkpoints"
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
