"""Fine-tuning does what a plain loop in torch does, keeps the best weights.

And trains its control on the same tokens.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.evaluation import held_out_loss
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.history import Step
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model
from dense2moe.upcycle.training.phase import Trained
from dense2moe.upcycle.training.prompt import run_with_prompt

BLOCK = 32
NUM_TRAIN_BLOCKS = 21  # no epoch ends with a step of eight blocks, nor with a part of one
CONFIG = FinetuneConfig(
    steps=9,
    batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    expert_learning_rate=2e-3,
    router_learning_rate=1e-2,
    weight_decay=0.1,
    warmup_steps=2,
    max_grad_norm=0.5,
    balance_coefficient=0.05,
    z_coefficient=0.01,
    eval_steps=3,
    patience=10,
    precision="float32",
)
SHORT = CONFIG.model_copy(
    update={"batch_size": 4, "gradient_accumulation_steps": 1, "warmup_steps": 0, "control": False}
)


def quiet(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """One fine-tuning: what it returned, where it wrote, the batches it trained on in order, and its progress."""

    facts: FinetuneFacts
    output: Path
    batches: tuple[torch.Tensor, ...]
    progress: tuple[tuple[str, int, int], ...]


@pytest.fixture(scope="module")
def data(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a tiny grammar, in blocks."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = [
        ["the", "one", "some"],
        ["small", "old", "red"],
        ["cat", "dog", "bird"],
        ["sees", "finds", "likes"],
        ["milk.", "trees.", "us."],
    ]
    for name, num in (("train", 400), ("validation", 50), ("test", 50)):
        (directory / f"{name}.txt").write_text(
            "\n".join(" ".join(draw.choice(choices) for choices in words) for _ in range(num))
        )
    source = TextData(
        kind="text", train=("train.txt",), validation=("validation.txt",), test=("test.txt",), separator="\n"
    )
    config = DataConfig(source=source, block_size=BLOCK, max_train_tokens=NUM_TRAIN_BLOCKS * BLOCK)
    prepare_data(dense_checkpoint, directory, config, directory, quiet)
    return directory


@contextmanager
def batches_recorded() -> Iterator[list[torch.Tensor]]:
    """For the length of a `with`, the batches that are trained on, in order."""
    batches: list[torch.Tensor] = []

    def recorded(call: Any, model: Any, inputs: Any, prompt: Any, read: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # and not the pass that only counts
            batches.append(inputs["input_ids"].clone())
        return run_with_prompt(call, model, inputs, prompt, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.upcycle.training.trainer.run_with_prompt", recorded)
        yield batches


@pytest.fixture(scope="module")
def start(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    def start(
        config: FinetuneConfig,
        seed: int = 0,
        mixture: Path = mixture_checkpoint,
        dense: Path = dense_checkpoint,
        progress: Any = quiet,
    ) -> Run:
        output = tmp_path_factory.mktemp("finetuned")
        seen: list[tuple[str, int, int]] = []
        with batches_recorded() as batches:
            scratch = tmp_path_factory.mktemp("scratch")
            facts = finetune(
                dense,
                mixture,
                data,
                output,
                config,
                seed,
                lambda *report: (seen.append(report), progress(*report)),
                scratch,
            )
        return Run(facts, output, tuple(batches), tuple(seen))

    return start


@dataclass(frozen=True)
class Alone:
    """One model's training: what it returned, where it wrote, and the batches it trained on in order."""

    trained: Trained
    output: Path
    batches: tuple[torch.Tensor, ...]


Train = Callable[..., Alone]


@pytest.fixture(scope="module")
def train(mixture_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The training of a fine-tuning, without the measurements of the models before and after."""

    def train(config: FinetuneConfig, seed: int = 0, progress: Any = quiet) -> Alone:
        output = tmp_path_factory.mktemp("trained")
        scratch, layers = tmp_path_factory.mktemp("scratch"), sparse_layers(load_shape(mixture_checkpoint, NEXT_TOKEN))
        setup = Setup(layers, data, scratch, config.precision, seed)
        job = Job("fine-tuned", mixture_checkpoint, output, config.resolve_phases())
        with batches_recorded() as batches:
            trained = train_model(job, setup, None, progress)
        return Alone(trained, output, tuple(batches))

    return train


@pytest.fixture(scope="module")
def run(start: Callable[..., Run]) -> Run:
    return start(CONFIG)


def of(run: Run, model: str) -> list[Step]:
    return [step for step in run.facts.history if step.model == model]


# The loop


def rate(step: int) -> float:
    """Share of the peak learning rate at a step counted from zero: two steps of warm-up, then a cosine to a tenth."""
    if step < CONFIG.warmup_steps:
        return (step + 1) / CONFIG.warmup_steps
    share = (step - CONFIG.warmup_steps) / (CONFIG.steps - CONFIG.warmup_steps)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2


def peak(name: str) -> float:
    if name.endswith("mlp.gate.weight"):
        return CONFIG.router_learning_rate
    return CONFIG.expert_learning_rate or 0.0 if ".mlp." in name else CONFIG.learning_rate


def plain_loop(model: PreTrainedModel, batches: tuple[torch.Tensor, ...]) -> Iterator[tuple[float, float]]:
    """The recipe of `CONFIG` without a Trainer, and a step in one part.

    Yields each step's next-token loss and balance loss.
    """
    routers = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    decays = {name: CONFIG.weight_decay if p.ndim == 2 or p.ndim == 3 else 0.0 for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "name": name, "weight_decay": 0.0 if name in routers else decays[name]}
            for name, p in model.named_parameters()
        ],
        betas=(0.9, 0.95),
    )
    model.train()
    for step in range(CONFIG.steps):
        ids = torch.cat(batches[2 * step : 2 * step + 2])
        outputs = model(
            ids, labels=ids, **({"output_router_logits": True, "router_aux_loss_coef": 0.0} if routers else {})
        )
        loss = outputs.loss - (model.config.router_aux_loss_coef * outputs.aux_loss if routers else 0.0)
        balance = z = torch.tensor(0.0)
        if routers:
            balance = torch.stack(
                [load_balancing_loss_func((logits,), 4, 2) / 2 for logits in outputs.router_logits]
            ).mean()
            z = torch.stack([logits.exp().sum(-1).log() ** 2 for logits in outputs.router_logits]).mean()
        (loss + CONFIG.balance_coefficient * balance + CONFIG.z_coefficient * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = peak(group["name"]) * rate(step)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach()), float(balance.detach())


@pytest.mark.parametrize(
    ("model", "fixture", "first"),
    [("fine-tuned", "mixture_checkpoint", 0), ("dense continued", "dense_checkpoint", 18)],
)
def test_training_is_a_plain_loop_over_the_same_batches(
    model: str, fixture: str, first: int, run: Run, request: pytest.FixtureRequest
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(fixture), dtype=torch.float32)
    expected = list(plain_loop(plain, run.batches[first : first + 18]))
    steps = [step for step in of(run, model) if step.train_loss is not None]
    assert [step.step for step in steps] == list(range(1, 10))
    # The Trainer sums in another order, and AdamW magnifies rounding where gradients are near zero.
    assert [step.train_loss for step in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    if model == "fine-tuned":
        assert [step.balance_loss for step in steps] == pytest.approx([balance for _, balance in expected], rel=1e-3)
    else:
        assert all(step.balance_loss is None and step.layers == () for step in steps)


def test_the_control_trains_on_the_same_batches_in_the_same_order(run: Run) -> None:
    equal_compute = run.facts.num_steps["dense, same FLOPs"]
    assert len(run.batches) == 2 * (18 + equal_compute)
    assert all(torch.equal(ours, control) for ours, control in zip(run.batches[:18], run.batches[18:36], strict=True))
    shared = min(18, 2 * equal_compute)
    assert all(
        torch.equal(ours, control)
        for ours, control in zip(run.batches[:shared], run.batches[36 : 36 + shared], strict=True)
    )


def test_the_control_of_equal_compute_has_the_operations_of_the_mixture(run: Run) -> None:
    flops, steps = run.facts.flops, run.facts.num_steps
    a_step = flops["dense continued"] / steps["dense continued"]
    assert flops["dense, same FLOPs"] == pytest.approx(a_step * steps["dense, same FLOPs"])
    assert abs(flops["dense, same FLOPs"] - flops["fine-tuned"]) <= a_step / 2
    assert flops["fine-tuned"] > 1.2 * flops["dense continued"]


def test_a_thousand_million_steps_begin_at_once(train: Train) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned"):
            raise Stopped

    with pytest.raises(Stopped):
        train(SHORT.model_copy(update={"steps": 10**9, "eval_steps": 10**9}), progress=stop)


def test_a_batch_of_many_times_the_text_is_refused(start: Callable[..., Run]) -> None:
    with pytest.raises(UpcycleError) as excinfo:
        start(SHORT.model_copy(update={"batch_size": 10**9}))
    assert str(excinfo.value) == (
        "finetune.batch_size is 1000000000; it must be at most 336, 16 times the blocks of the training split; lower "
        "it, or give more text"
    )


def test_gradients_are_not_clipped_without_a_norm(train: Train) -> None:
    """AdamW without decay does not see a gradient's size, but for its epsilon.

    The first step shows what it was given.
    """
    norms = []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))

    handle = register_optimizer_step_pre_hook(take)
    try:
        for norm in (1e-3, 1e9, None):
            train(SHORT.model_copy(update={"steps": 1, "eval_steps": 1, "max_grad_norm": norm}))
    finally:
        handle.remove()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] == norms[2] > 0.1


def test_every_block_is_met_once_an_epoch(run: Run, data: Path) -> None:
    blocks = torch.cat(run.batches[:18]).tolist()
    epochs = [blocks[start : start + NUM_TRAIN_BLOCKS] for start in (0, NUM_TRAIN_BLOCKS)]
    everything = read_blocks(data, "train").tolist()
    assert [sorted(epoch) for epoch in epochs] == [sorted(everything)] * 2
    assert epochs[0] != epochs[1]
    assert everything not in epochs


def test_tokens_are_counted_as_they_are_fed(run: Run) -> None:
    for first, model in ((0, "fine-tuned"), (18, "dense continued")):
        fed = [sum(ids.numel() for ids in run.batches[first : first + 2 * step]) for step in range(10)]
        assert all(step.num_tokens == fed[step.step] for step in of(run, model))


def test_the_loss_falls(run: Run) -> None:
    for model, before in (("fine-tuned", "upcycled"), ("dense continued", "dense")):
        losses = [step.train_loss for step in of(run, model) if step.train_loss is not None]
        assert losses[-1] < losses[0] - 0.5
        assert run.facts.evaluations[model].loss < run.facts.evaluations[before].loss - 0.5


def test_every_layer_is_watched(run: Run) -> None:
    steps = [step for step in of(run, "fine-tuned") if step.train_loss is not None]
    for step in steps:
        assert len(step.layers) == 2
        for layer in step.layers:
            assert len(layer.load) == 4
            assert sum(layer.load) == pytest.approx(1.0, abs=1e-6)
            assert 0 <= layer.entropy <= math.log(4)


def test_the_history_on_disk_is_the_history(run: Run) -> None:
    lines = [json.loads(line) for line in (run.output / "history.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps([asdict(step) for step in run.facts.history]))
    looks = [(step.model, step.step) for step in run.facts.history if step.validation_loss is not None]
    assert looks[:8] == [(model, step) for model in ("fine-tuned", "dense continued") for step in (0, 3, 6, 9)]
    last = run.facts.num_steps["dense, same FLOPs"]
    assert looks[8:] == [("dense, same FLOPs", step) for step in sorted({*range(0, last + 1, 3), last})]


def test_progress_counts_the_steps_of_both_models(run: Run) -> None:
    for model in ("fine-tuned", "dense continued"):
        assert [report[1:] for report in run.progress if report[0].startswith(f"training {model}")] == [
            (step, 9) for step in range(1, 10)
        ]


# What is kept


@pytest.mark.parametrize(
    ("model", "folder", "architecture"),
    [("fine-tuned", ".", "MixtralForCausalLM"), ("dense continued", "control", "LlamaForCausalLM")],
)
def test_the_best_step_is_saved_and_loads_in_plain_transformers(
    model: str, folder: str, architecture: str, run: Run, data: Path
) -> None:
    directory = run.output / folder
    looks = {step.step: step.validation_loss for step in of(run, model) if step.validation_loss is not None}
    best = min(looks, key=looks.__getitem__)
    assert run.facts.best_steps[model] == best
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__name__ == architecture
    assert loaded.dtype == torch.float32
    assert loaded.config.use_cache
    # The same weights through another experts implementation.
    assert held_out_loss(loaded.eval(), read_blocks(data, "validation")) == pytest.approx(looks[best], rel=1e-5)
    evaluation = run.facts.evaluations[model]
    assert evaluation.loss == pytest.approx(held_out_loss(loaded, read_blocks(data, "test")), rel=1e-5)
    assert [(figure.name, figure.value, figure.unit, figure.better) for figure in evaluation.figures] == [
        ("perplexity", math.exp(evaluation.loss), "", "lower"),
        ("loss", evaluation.loss, "nats", "lower"),
    ]
    assert evaluation.num_parameters == sum(p.numel() for p in loaded.parameters())
    assert AutoTokenizer.from_pretrained(directory)("a cat")["input_ids"][0] == 0


def test_only_checkpoints_and_the_history_are_left(run: Run) -> None:
    checkpoint = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in run.output.iterdir()} == checkpoint | {
        "control",
        "control-same-flops",
        "history.jsonl",
    }
    for folder in ("control", "control-same-flops"):
        assert {path.name for path in (run.output / folder).iterdir()} == checkpoint
    assert run.facts.evaluations.keys() == {
        "dense",
        "upcycled",
        "fine-tuned",
        "dense continued",
        "dense, same FLOPs",
    }
    assert run.facts.precision == "float32"


def test_two_runs_with_one_seed_are_equal_bit_for_bit(run: Run, start: Callable[..., Run]) -> None:
    again = start(CONFIG)
    for name in ("model.safetensors", "control/model.safetensors"):
        assert (again.output / name).read_bytes() == (run.output / name).read_bytes()
    for model in ("fine-tuned", "dense continued"):
        assert of(again, model) == of(run, model)


def test_another_seed_draws_other_batches(run: Run, train: Train) -> None:
    other = train(SHORT.model_copy(update={"steps": 2, "eval_steps": 2}), seed=1)
    assert not torch.equal(other.batches[0], run.batches[0])


def test_without_control_there_is_none(start: Callable[..., Run]) -> None:
    # more than there are steps: the last is looked at
    run = start(SHORT.model_copy(update={"steps": 2, "eval_steps": 50}))
    assert not (run.output / "control").exists()
    assert run.facts.evaluations.keys() == {"dense", "upcycled", "fine-tuned"}
    assert run.facts.best_steps == {"fine-tuned": 2}
    assert len(run.batches) == 2


def test_only_the_routers_learn_in_their_warm_up(mixture_checkpoint: Path, train: Train) -> None:
    run = train(SHORT.model_copy(update={"steps": 3, "train": "router"}))
    before, after = load_file(mixture_checkpoint / "model.safetensors"), load_file(run.output / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)}


def test_the_best_weights_are_kept_whole_when_later_ones_are_worse(start: Callable[..., Run], data: Path) -> None:
    """The Trainer by itself restores all but the experts and the routers.

    Whose names on disk are not those in memory.
    """
    # every step harms, each more
    run = start(
        SHORT.model_copy(
            update={"steps": 2, "eval_steps": 1, "learning_rate": 2.0, "expert_learning_rate": None, "control": True}
        )
    )
    for model, folder in (("fine-tuned", "."), ("dense continued", "control")):
        looks = {step.step: step.validation_loss for step in of(run, model) if step.validation_loss is not None}
        best = min(looks, key=looks.__getitem__)
        assert best < 2
        assert run.facts.best_steps[model] == best
        # Training sums the experts in another order than `load_model` does.
        assert held_out_loss(
            load_model(run.output / folder, torch.float32), read_blocks(data, "validation")
        ) == pytest.approx(looks[best], rel=1e-6)


def test_training_stops_when_the_validation_loss_no_longer_falls(mixture_checkpoint: Path, train: Train) -> None:
    # Rates too small to change a weight: no look is better than the start.
    changes = {
        "steps": 9,
        "eval_steps": 1,
        "patience": 2,
        "learning_rate": 1e-20,
        "expert_learning_rate": 1e-20,
        "router_learning_rate": 1e-20,
    }
    run = train(SHORT.model_copy(update=changes))
    assert run.trained.best_step == 0
    assert max(step.step for step in run.trained.history) == 2
    before, after = load_file(mixture_checkpoint / "model.safetensors"), load_file(run.output / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


HARM = {"learning_rate": 3.0, "expert_learning_rate": 3.0, "router_learning_rate": 3.0, "steps": 3, "eval_steps": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"train": "last-1"},
        {"precision": "bfloat16", "patience": 1},
        {"stages": ({"steps": 2}, {"train": "lora", "steps": 2})},
    ],
)
def test_training_that_only_harms_leaves_the_very_weights_of_the_start_and_says_so(
    change: dict[str, Any], start: Callable[..., Run], run: Run
) -> None:
    """It begins with what the first run learned: a model as it was drawn could only become better."""
    before = {"fine-tuned": run.output, "dense continued": run.output / "control"}
    run = start(
        FinetuneConfig.model_validate(SHORT.model_dump() | HARM | {"control": True} | change), 0, *before.values()
    )
    for number, (model, folder) in enumerate({"fine-tuned": ".", "dense continued": "control"}.items()):
        looks = [step for step in of(run, model) if step.validation_loss is not None]
        assert looks[0].step == 0
        assert all(look.validation_loss >= looks[0].validation_loss for look in looks)  # type: ignore[operator]
        assert max(look.step for look in looks) == run.facts.num_steps[model] > 0
        assert run.facts.best_steps[model] == 0
        old, new = load_file(before[model] / "model.safetensors"), load_file(run.output / folder / "model.safetensors")
        assert {name: tensor.numpy().tobytes() for name, tensor in old.items()} == {
            name: tensor.numpy().tobytes() for name, tensor in new.items()
        }
        assert run.facts.warnings[number] == (
            f"{model}: no evaluation on the validation split was better than at the start, so the start's weights were "
            "kept; "
            "lower finetune.learning_rate, or give more text or steps"
        )
    assert run.facts.evaluations["fine-tuned"].loss == run.facts.evaluations["upcycled"].loss


def test_the_start_of_a_later_stage_is_the_best_of_the_stage_before(start: Callable[..., Run], train: Train) -> None:
    """The second stage harms: the step that is kept is one of the first."""
    stages = ({"steps": 4}, {name: value for name, value in HARM.items() if name != "eval_steps"} | {"steps": 2})
    run = start(FinetuneConfig.model_validate(SHORT.model_dump() | {"eval_steps": 2, "stages": stages}))
    looked = (step for step in of(run, "fine-tuned") if step.validation_loss is not None)
    looks = {(step.phase, step.step): step.validation_loss for step in looked}
    assert list(looks) == [(0, 0), (0, 2), (0, 4), (1, 4), (1, 6)]
    assert run.facts.best_steps == {"fine-tuned": 4}
    assert run.facts.warnings == ()
    assert looks[1, 4] == looks[0, 4]
    alone = train(FinetuneConfig.model_validate(SHORT.model_dump() | {"eval_steps": 2, "steps": 4}))
    assert (run.output / "model.safetensors").read_bytes() == (alone.output / "model.safetensors").read_bytes()


def test_bfloat16_autocast_still_saves_float32(start: Callable[..., Run]) -> None:
    run = start(SHORT.model_copy(update={"steps": 3, "eval_steps": 3, "precision": "bfloat16"}))
    assert run.facts.precision == "bfloat16"
    assert {tensor.dtype for tensor in load_file(run.output / "model.safetensors").values()} == {torch.float32}


def test_a_loss_that_is_no_number_is_one_line(train: Train) -> None:
    with pytest.raises(UpcycleError) as excinfo:
        train(
            SHORT.model_copy(update={"learning_rate": 1e30, "expert_learning_rate": 1e30, "router_learning_rate": 1e30})
        )
    assert re.fullmatch(
        r"finetune: the loss of fine-tuned is (nan|inf) at step \d; lower finetune\.learning_rate", str(excinfo.value)
    )


# What is told


def test_equal_experts_give_the_routers_no_task_gradient_and_a_warning(
    dense_checkpoint: Path, start: Callable[..., Run], tmp_path: Path
) -> None:
    upcycle(dense_checkpoint, tmp_path, UpcycleConfig(num_experts=4, router=RouterConfig(logit_std=1.0)), 0, quiet)
    facts = start(SHORT.model_copy(update={"steps": 2, "eval_steps": 2}), mixture=tmp_path).facts
    assert facts.router_task_gradient < 1e-6
    assert facts.warnings[0] == (
        f"the routers' task gradient was {facts.router_task_gradient:.0e} of the whole at the start: equal experts "
        "give a renormalizing router "
        "nothing to learn from; it followed the balance loss until the experts diverged; set upcycle.experts.noise to "
        "make them differ at the start"
    )


def test_the_task_gradient_is_the_routers_share_of_the_whole(run: Run, mixture_checkpoint: Path, data: Path) -> None:
    model = load_model(mixture_checkpoint, torch.float32)
    ids = read_blocks(data, "train")[:2]
    model(ids, labels=ids).loss.backward()
    routers = [p.grad.flatten() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]  # type: ignore[union-attr]
    everything = [p.grad.flatten() for p in model.parameters()]  # type: ignore[union-attr]
    assert len(routers) == 2
    assert run.facts.router_task_gradient == pytest.approx(
        float(torch.cat(routers).norm() / torch.cat(everything).norm()), rel=1e-4
    )
    assert run.facts.router_task_gradient > 1e-4
    assert not [warning for warning in run.facts.warnings if "task gradient" in warning]
