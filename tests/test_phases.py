"""Phases follow each other, each with its routing, its objective and its rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import (
    BLOCK,
    CONFIG,
    Start,
    TrainAlone,
    changed,
    first_step,
    make_biased,
    make_data,
    make_start,
    make_train_alone,
    quiet,
    weights,
)

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.next_token import distillation_loss, next_token_loss
from dense2moe.upcycle.training.config import Distillation, TrainingPhase
from dense2moe.upcycle.training.evaluation import held_out_loss
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.order import Grouping, draw_order
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.phase_run import run_phase
from dense2moe.upcycle.training.routing import Routing
from dense2moe.upcycle.training.schedule import schedule_share
from tests.conftest import MakeDense

data, start, train, biased = make_data, make_start, make_train_alone, make_biased  # fixtures


# Stages


def test_stages_follow_each_other_and_count_on(start: Start, mixture_checkpoint: Path) -> None:
    stages = (
        TrainingPhase(train="router", steps=2),
        TrainingPhase(train="experts", steps=4, schedule="constant", learning_rate=5e-4),
    )
    facts, output = start(CONFIG.model_copy(update={"stages": stages}))
    logged = [step for step in facts.history if step.train_loss is not None]
    assert [(step.phase, step.step) for step in logged] == [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert [step.num_tokens for step in logged] == [step * 4 * BLOCK for step in range(1, 7)]
    assert facts.num_steps == {"fine-tuned": 6}
    assert changed(mixture_checkpoint, output) == {name for name in weights(output) if "block_sparse_moe" in name}


def test_a_stage_begins_with_the_best_weights_of_the_one_before(train_alone: TrainAlone) -> None:
    one = train_alone(CONFIG.model_copy(update={"steps": 4}))
    both = train_alone(
        CONFIG.model_copy(
            update={
                "stages": (
                    TrainingPhase(steps=4),
                    TrainingPhase(steps=2, learning_rate=1e-20, router_learning_rate=1e-20),
                )
            }
        )
    )
    assert one[0].best_step == 4
    assert both[0].best_step == 4
    # float32 weights do not move by 1e-20.
    assert changed(one[1], both[1]) == set()


def test_experts_of_their_own_domains_learn_those_alone(train_alone: TrainAlone, mixture_checkpoint: Path) -> None:
    stage = TrainingPhase(train="experts", routing="by-domain")
    facts, output = train_alone(CONFIG.model_copy(update={"stages": (stage,)}))
    assert changed(mixture_checkpoint, output) == {name for name in weights(output) if ".experts." in name}
    assert all(step.balance_loss is None for step in facts.history)


def test_by_domain_sends_a_batch_of_one_domain_to_its_experts_alone(
    train_alone: TrainAlone, mixture_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = load_file(data / "train.safetensors")
    only_digits = torch.nonzero(blocks["domains"] == 1).flatten()
    monkeypatch.setattr(
        "dense2moe.upcycle.training.job.draw_order", lambda _, count, *__: only_digits.repeat(count)[:count]
    )
    _, output = train_alone(
        CONFIG.model_copy(update={"stages": (TrainingPhase(train="experts", routing="by-domain"),)})
    )
    assert changed(mixture_checkpoint, output) == {
        name for name in weights(output) if ".experts.2." in name or ".experts.3." in name
    }


def test_a_stage_by_domain_is_watched_and_judged_as_it_is_trained(
    train_alone: TrainAlone, mixture_checkpoint: Path, data: Path
) -> None:
    """With rates too small to change a weight: the validation loss is that of each domain through its own experts."""
    stage = TrainingPhase(train="experts", routing="by-domain", steps=2, learning_rate=1e-20)
    facts, _ = train_alone(CONFIG.model_copy(update={"stages": (stage,)}))
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
    stage = TrainingPhase(train="experts", routing="by-domain", learning_rate=1e-20).model_dump(exclude_none=True)
    settings = CONFIG.model_copy(update={"steps": 1, **stage})
    domains = torch.tensor([0, 1, 1, 0])
    made = load_model(tmp_path, torch.float32)
    result = run_phase(
        made,
        None,
        Phase(
            "m",
            0,
            settings,
            Examples.of_blocks(ids, domains),
            Examples.of_blocks(ids, domains),
            2,
            0,
            1,
            (0, 1),
            "float32",
            0,
        ),
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
    config = CONFIG.model_copy(update={"stages": (TrainingPhase(train="experts", routing="by-domain"),)})
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


def test_computing_the_inner_values_twice_changes_nothing(train_alone: TrainAlone) -> None:
    plain, again = (
        train_alone(CONFIG.model_copy(update={"gradient_checkpointing": value}))[1] for value in (False, True)
    )
    assert changed(plain, again) == set()


def test_the_load_is_that_of_the_whole_batch_however_many_parts_it_has(
    mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    steps = [
        first_step(
            mixture_checkpoint,
            data,
            CONFIG.model_copy(update={"gradient_accumulation_steps": parts}),
            tmp_path / str(parts),
        )
        for parts in (1, 2, 4)
    ]
    whole, *others = [[layer.load for layer in step.layers] for step in steps]
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
    kind: str, change: dict[str, Any], data: Path, tmp_path: Path, request: pytest.FixtureRequest
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
                "gradient_accumulation_steps": parts,
                "balance_coefficient": 0.5,
                "z_coefficient": 0.1,
                "max_grad_norm": 1e9,
            }
            config = CONFIG.model_copy(update=settings | change)
            steps.append(first_step(request.getfixturevalue(kind), data, config, tmp_path / str(parts)))
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
    mixture_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted ahead is what the parts then measure, bit for bit."""
    measured: list[torch.Tensor] = []
    plain = Routing._measure_load

    def measure(routing: Any, biases: Any) -> torch.Tensor:
        measured.append(plain(routing, biases))
        return measured[-1]

    monkeypatch.setattr(Routing, "_measure_load", measure)
    update = {"gradient_accumulation_steps": 2, "expert_dropout": 0.5, "balance_coefficient": 0.01}
    config = CONFIG.model_copy(update=update)
    first_step(mixture_checkpoint, data, config, tmp_path)
    ahead, parts = measured[:2], measured[2:]
    assert [load.tolist() for load in parts] == [load.tolist() for load in ahead]
    assert ahead[0].tolist() != ahead[1].tolist()


def test_the_last_weights_are_looked_at_too(train_alone: TrainAlone) -> None:
    trained, _ = train_alone(CONFIG.model_copy(update={"steps": 5, "eval_steps": 3}))
    assert [step.step for step in trained.history if step.validation_loss is not None] == [0, 3, 5]


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


def test_the_order_is_drawn_epoch_by_epoch_and_is_that_of_all_drawn_at_once() -> None:
    generator = torch.Generator().manual_seed(7)
    expected = torch.cat([torch.randperm(5, generator=generator) for _ in range(4)]).tolist()[:18]
    order = draw_order(5, 18, 7)
    assert list(order) == expected
    # as a run that is taken up does
    assert [order[index] for index in (17, 0, 9, 3)] == [expected[index] for index in (17, 0, 9, 3)]
    assert list(order[4:11]) == expected[4:11]
    assert list(order[4:11][2:5]) == expected[6:9]
    assert len(draw_order(5, 10**18, 7)[10**17 : 10**18]) == 9 * 10**17


def test_examples_of_one_length_share_a_batch_in_every_epoch_and_each_comes_once_an_epoch() -> None:
    """Lengths come in fours and batches have four: an epoch of 40 has no batch of two lengths."""
    lengths = torch.arange(40) // 4
    order = list(draw_order(40, 120, 7, Grouping(lengths, 4)))
    for epoch in range(3):
        places = order[40 * epoch : 40 * epoch + 40]
        assert sorted(places) == list(range(40))
        assert all(len({int(lengths[place]) for place in places[begin : begin + 4]}) == 1 for begin in range(0, 40, 4))
    means = [float(lengths[order[begin : begin + 4]].float().mean()) for begin in range(0, 40, 4)]
    assert means not in (sorted(means), sorted(means, reverse=True))  # no epoch runs from short to long


def test_batches_of_one_length_stand_across_epochs_that_end_within_one() -> None:
    lengths = torch.randint(1, 50, (43,), generator=torch.Generator().manual_seed(0))
    grouping = Grouping(lengths, 8)
    order = draw_order(43, 430, 3, grouping)
    assert all(sorted(order[begin : begin + 43]) == list(range(43)) for begin in range(0, 430, 43))

    def padding(places: Sequence[int]) -> int:
        batches = [lengths[list(places[begin : begin + 8])] for begin in range(0, 424, 8)]
        return sum(int(batch.max()) * len(batch) - int(batch.sum()) for batch in batches)

    assert padding(order) < 0.5 * padding(draw_order(43, 430, 3))
    assert [order[index] for index in (429, 0, 200)] == [list(order)[index] for index in (429, 0, 200)]
    assert list(order[48:96][8:16]) == list(order)[56:64]


# Domains


def test_routing_differs_between_domains_more_than_within_one(start: Start) -> None:
    stages = (
        TrainingPhase(train="experts", routing="by-domain", steps=20),
        TrainingPhase(train="router", steps=40, balance_coefficient=0.0),
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
