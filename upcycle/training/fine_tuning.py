"""A brief fine-tune, stage by stage, of the mixture and its dense controls.

A killed run is taken up from its last checkpoint: a finished stage leaves its weights and its history in the scratch
directory, an unfinished one its checkpoints, each in a folder that `dense2moe.upcycle.durable` seals. The weights that
come out are the same, bit for bit on one machine's CPU.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dense2moe.upcycle.checkpoints.config_files import complete_config
from dense2moe.upcycle.checkpoints.loaded import router_modules, router_weights, selection_biases, sparse_layers
from dense2moe.upcycle.checkpoints.reader import copy_companions
from dense2moe.upcycle.data.blocks import read_blocks, read_domains
from dense2moe.upcycle.durable import RECORD_NAME, begin, discard, is_kept, keep, read_facts
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.balance import expert_load
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.models.routing import find_gate
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.evaluation import EVALUATION_BATCH, evaluate
from dense2moe.upcycle.training.facts import DomainRouting, Evaluation, FinetuneFacts
from dense2moe.upcycle.training.frozen import load_frozen, load_stored, stored_dtype
from dense2moe.upcycle.training.history import ModelName, Step, read_history, write_history
from dense2moe.upcycle.training.objective import next_token_loss
from dense2moe.upcycle.training.processes import join_processes, on_main, whole
from dense2moe.upcycle.training.prompt import PARAMETER, PROMPT_DIRECTORY, get_prompt, write_prompt
from dense2moe.upcycle.training.trainable import count_last_layers
from dense2moe.upcycle.training.trainer import Stage, Trained, check_settings, run_stage, write_events

CONTROL_DIRECTORY = "control"
EQUAL_TIME_DIRECTORY = "control-equal-time"
EVENTS_DIRECTORY = "tensorboard"
HISTORY_NAME = "history.jsonl"
_GRADIENT_BLOCKS = 2  # that the routers' task gradient is measured on
_MAX_REPEATS = 16  # more copies of a block in one step are a slip of the pen
_TRAINED_NAME = "trained"  # a finished stage, beside its checkpoints
_STEPS_NAME = "steps"


@dataclass(frozen=True)
class Job:
    """One model to be trained: its name, where it comes from and goes to, and its stages."""

    name: ModelName
    source: Path
    target: Path
    stages: tuple[FinetuneConfig, ...]


def finetune(
    dense: Path,
    mixture: Path,
    data: Path,
    output: Path,
    config: FinetuneConfig,
    seed: int,
    progress: Progress,
    scratch: Path,
) -> FinetuneFacts:
    """Fine-tune the checkpoint in `mixture` on the blocks in `data`.

    Writes the best weights (by validation loss) to `output`. The weights that training starts from are among those
    looked at, so what only harms leaves them as they are, with a warning.

    With `config.control` the checkpoint in `dense` is continued twice, on the same batches in the same order: for the
    same steps, into `output/control`, and for as long as the mixture took, into `output/control-equal-time`. The
    history goes to `output/history.jsonl`. What a killed run needs to go on is kept in `scratch`, which the caller
    hands to `durable.discard_damage` before, and deletes when all is well.

    Under `accelerate launch` every process calls this, and `leave_processes` in the end; the first one writes, and all
    of them return the same facts.

    Raises:
        UpcycleError: the loss became NaN or infinite, memory ran out, or the settings do not fit the model, the data or
            the number of processes.
        OSError: the disk is full or not writable.
    """
    shape = _without_weights(mixture)
    check_finetune(config, shape.config.num_hidden_layers)
    stages, (domains, of_blocks) = config.resolve_stages(), read_domains(data, "train")
    if config.batch_size > _MAX_REPEATS * len(of_blocks):
        raise UpcycleError(
            f"finetune.batch_size is {config.batch_size}; it must be at most {_MAX_REPEATS * len(of_blocks)}, "
            f"{_MAX_REPEATS} times the blocks of the "
            "training split; lower it, or give more text"
        )
    for settings in stages:
        check_settings(shape, settings, len(domains))
    precision = _precision(config)
    test = read_blocks(data, "test")
    evaluations: dict[ModelName, Evaluation] = on_main(
        lambda: {
            "dense": evaluate(dense, test, "dense", progress),
            "upcycled": evaluate(mixture, test, "upcycled", progress),
        }
    )
    train = read_blocks(data, "train")
    gradient = on_main(lambda: _router_task_gradient(mixture, train[:_GRADIENT_BLOCKS]))
    trained: dict[ModelName, Trained] = {}
    for job in _jobs(dense, mixture, output, config, trained):
        trained[job.name] = train_model(
            job,
            mixture,
            data,
            precision,
            seed,
            scratch,
            dense if config.distillation and job.source == mixture else None,
            progress,
        )
        evaluations[job.name] = on_main(partial(evaluate, job.target, test, job.name, progress))
    history = tuple(step for each in trained.values() for step in each.history)
    if join_processes().is_main_process:
        write_history(output / HISTORY_NAME, history)
    return FinetuneFacts(
        evaluations,
        history,
        {name: each.best_step for name, each in trained.items()},
        {name: each.last_step for name, each in trained.items()},
        {name: each.seconds for name, each in trained.items()},
        precision,
        gradient,
        on_main(lambda: measure_domains(output, data)),
        sparse_layers(shape),
        (*_harm(trained, evaluations), *_warnings(history, gradient, stages[-1])),
        {name: each.compute_seconds for name, each in trained.items()},
    )


def measure_untrained(dense: Path, mixture: Path, data: Path, output: Path, progress: Progress) -> FinetuneFacts:
    """The facts of a run without fine-tuning.

    Held-out figures of the dense model and of the mixture, and an empty history in `output`.
    """
    test = read_blocks(data, "test")
    evaluations: dict[ModelName, Evaluation] = on_main(
        lambda: {
            "dense": evaluate(dense, test, "dense", progress),
            "upcycled": evaluate(mixture, test, "upcycled", progress),
        }
    )
    if join_processes().is_main_process:
        write_history(output / HISTORY_NAME, ())
    domains = on_main(lambda: measure_domains(mixture, data))
    return FinetuneFacts(evaluations, (), {}, {}, {}, None, None, domains, sparse_layers(_without_weights(mixture)))


def _jobs(
    dense: Path, mixture: Path, output: Path, config: FinetuneConfig, trained: dict[ModelName, Trained]
) -> Iterator[Job]:
    """The mixture and its controls, each when those before it are in `trained`."""
    stages = config.resolve_stages()
    yield Job("fine-tuned", mixture, output, stages)
    if config.control:
        yield Job("dense continued", dense, output / CONTROL_DIRECTORY, stages)
        yield Job("dense, equal time", dense, output / EQUAL_TIME_DIRECTORY, _stretch(stages, trained))


def check_finetune(config: FinetuneConfig, num_layers: int) -> None:
    """Refuse what the model's depth and this installation cannot do, before any work.

    Raises:
        UpcycleError: fewer layers than the last that are to learn, or no writer for TensorBoard.
    """
    for stage in config.resolve_stages():
        if stage.train.startswith("last-"):
            count_last_layers(stage.train, num_layers)
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UpcycleError(
            "finetune.tensorboard is true and tensorboardX is not installed; install it (pip install "
            "'dense2moe[tensorboard]'), or set it to false"
        )


def _precision(config: FinetuneConfig) -> str:
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _router_task_gradient(mixture: Path, blocks: torch.Tensor) -> float:
    """Norm of the next-token loss's gradient in the routers, relative to that in all weights.

    On a few blocks of token ids [B, S]. About zero (1e-9) while experts are equal and weights are renormalized: the
    router then learns from the balance loss alone, until the experts have come apart. Each layer is computed a second
    time in the backward pass, and each weight's gradient is let go when it is squared: in memory are the weights as
    stored, one layer's inner values, and the gradient of one weight.
    """
    model = load_frozen(mixture)
    routers = {id(weight) for weight in router_weights(model)}
    squares = {True: 0.0, False: 0.0}

    def let_go(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        squares[id(parameter) in routers] += float(parameter.grad.float().square().sum())
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.numel():
            parameter.requires_grad_().register_post_accumulate_grad_hook(let_go)
    layers: Any = model.get_decoder()
    for layer in layers.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    next_token_loss(model(input_ids=blocks, use_cache=False).logits, blocks).backward()
    del model, layers, layer, parameter
    release_memory()  # a layer and its checkpointed pass hold each other
    return math.sqrt(squares[True] / max(sum(squares.values()), 1e-30))


def _harm(trained: Mapping[ModelName, Trained], evaluations: Mapping[ModelName, Evaluation]) -> Iterator[str]:
    """Where training helped nothing.

    No look was better than the start, or the weights that were kept are worse on the test split.
    """
    for name, each in trained.items():
        started = evaluations["upcycled" if name == "fine-tuned" else "dense"].loss
        if each.best_step == 0:
            yield (
                f"{name}: no look at the validation split was better than the start, so the weights are those of the "
                "start; "
                "lower finetune.learning_rate, or give more text or steps"
            )
        elif (reached := evaluations[name].loss) > started:
            yield (
                f"{name}: the weights that were kept, of step {each.best_step}, have a loss of {reached:.4f} on the "
                "test split, the start had "
                f"{started:.4f}; lower finetune.learning_rate, or give more text or steps"
            )


def _warnings(history: tuple[Step, ...], gradient: float, last_stage: FinetuneConfig) -> Iterator[str]:
    if gradient < 1e-6:
        yield (
            f"the routers' task gradient was {gradient:.0e} of the whole at the start: equal experts give a "
            "renormalizing router nothing to learn "
            "from; it followed the balance loss until the experts came apart; set upcycle.experts.noise to start "
            "them apart"
        )
    if last_stage.routing == "by-domain":
        yield (
            "the last of finetune.stages is by-domain: the routers have not learned which experts learned from which "
            "text; "
            "let a stage follow in which they learn"
        )
        return
    for number, loads in _recent_loads(history).items():
        dead = [expert for expert, load in enumerate(loads) if load < 0.1 / len(loads)]
        if dead:
            yield (
                f"layer {number}: experts {dead} get less than a tenth of their share of tokens; raise "
                "finetune.balance_coefficient"
            )


def _recent_loads(history: tuple[Step, ...]) -> dict[int, list[float]]:
    """The mean load of each layer's experts.

    By the layer's number, over all steps between the last two looks at the validation split.
    """
    lines = [step for step in history if step.layers]
    if not lines:
        return {}
    last = lines[-1]
    same_stage = [step for step in history if (step.model, step.stage) == (last.model, last.stage)]
    start = max(
        (step.step for step in same_stage if step.validation_loss is not None and step.step < last.step), default=0
    )
    counted = [
        (line, line.step - before) for line, before in zip(lines, [0, *(line.step for line in lines)], strict=False)
    ]
    recent = [(line, count) for line, count in counted if line.stage == last.stage and line.step > start]
    loads = sum(count * torch.tensor([layer.load for layer in line.layers]) for line, count in recent) / sum(
        count for _, count in recent
    )
    return {layer.number: load for layer, load in zip(last.layers, cast(torch.Tensor, loads).tolist(), strict=True)}


def _stretch(stages: tuple[FinetuneConfig, ...], trained: dict[ModelName, Trained]) -> tuple[FinetuneConfig, ...]:
    """The stages with as many steps in all as the dense model does while the mixture trains.

    By the seconds of computing that both took.
    """
    mixture, control = trained["fine-tuned"], trained["dense continued"]
    ratio = (
        mixture.compute_seconds / (control.compute_seconds / control.last_step) / sum(stage.steps for stage in stages)
    )
    return tuple(
        stage.model_copy(update={"steps": max(stage.warmup_steps + 1, round(stage.steps * ratio))}) for stage in stages
    )


def train_model(
    job: Job,
    mixture: Path,
    data: Path,
    precision: str,
    seed: int,
    scratch: Path,
    teacher: Path | None,
    progress: Progress,
) -> Trained:
    """Train one model through its stages and save it; a stage that an earlier run finished is not run again.

    `mixture` tells which layers have experts, and `teacher` is distilled from; the rest is as for `finetune`.
    """
    folder = scratch / job.name.replace(",", "").replace(" ", "-")
    job = _settle(job, folder)
    train, validation = read_blocks(data, "train"), read_blocks(data, "validation")
    names, domains = read_domains(data, "train")
    _, validation_domains = read_domains(data, "validation")
    order = draw_order(len(train), sum(stage.steps * stage.batch_size for stage in job.stages), seed)
    parent = _load_teacher(teacher) if teacher else None
    mixture_layers = sparse_layers(_without_weights(mixture))
    written = torch.float32 if job.stages[-1].dtype == "float32" else stored_dtype(job.source)
    source, first_step, best_step = job.source, 0, 0
    seconds = compute_seconds = 0.0
    history: list[Step] = []
    taken = 0
    total = sum(stage.steps for stage in job.stages)
    for number, settings in enumerate(job.stages):
        place = folder / f"stage-{number}"
        finished = place / _TRAINED_NAME
        blocks = order[taken : taken + settings.steps * settings.batch_size]
        taken += len(blocks)
        if not is_kept(finished):
            if join_processes().is_main_process:
                for later in range(number + 1, len(job.stages)):
                    discard(folder / f"stage-{later}")  # it went on from what is made again here
            stage = Stage(
                job.name,
                number,
                settings,
                train,
                domains,
                len(names),
                validation,
                validation_domains,
                first_step,
                total,
                mixture_layers,
                precision,
                seed,
                blocks,
                written if number + 1 == len(job.stages) else torch.float32,
            )
            model = load_stored(source)
            result = run_stage(model, parent, stage, place / "checkpoints", progress)
            release_memory()  # the Trainer and its callbacks hold each other, and the optimizer's state with them
            if join_processes().is_main_process:
                begin(finished)
                passed_over = {*model.all_tied_weights_keys, PARAMETER}
                _save(
                    model,
                    {name: whole(tensor) for name, tensor in model.state_dict().items() if name not in passed_over},
                    job.source,
                    finished,
                )
                if (prompt := get_prompt(model)) is not None:
                    write_prompt(prompt, model, finished / PROMPT_DIRECTORY)
                write_history(finished / HISTORY_NAME, result.history)
                keep(
                    finished,
                    {name: getattr(result, name) for name in ("best_step", "last_step", "seconds", "compute_seconds")},
                )
            join_processes().wait_for_everyone()
        if join_processes().is_main_process:
            discard(place / "checkpoints")  # also those of a run that was killed before this
        facts = read_facts(finished)
        history += read_history(finished / HISTORY_NAME)
        if facts["best_step"] > first_step:  # otherwise the weights are those that the stage began with
            best_step = facts["best_step"]
        source, first_step = finished, facts["last_step"]
        seconds, compute_seconds = seconds + facts["seconds"], compute_seconds + facts["compute_seconds"]
    if join_processes().is_main_process:
        shutil.copytree(
            source, job.target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORD_NAME, HISTORY_NAME)
        )
        if any(settings.tensorboard for settings in job.stages):
            write_events(
                job.target / EVENTS_DIRECTORY, [step for step in history if job.stages[step.stage].tensorboard]
            )
    join_processes().wait_for_everyone()
    return Trained(tuple(history), best_step, first_step, seconds, compute_seconds)


def _without_weights(directory: Path) -> PreTrainedModel:
    with torch.device("meta"), warnings.catch_warnings():
        # a shared expert of width 0
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        return cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            ),
        )


def _settle(job: Job, folder: Path) -> Job:
    """The job with the steps that it was begun with.

    Measured seconds decide them, and would be others on the next start.
    """
    if join_processes().is_main_process and not is_kept(folder / _STEPS_NAME):
        begin(folder)  # what is left of other steps is of no use
        keep(folder / _STEPS_NAME, [stage.steps for stage in job.stages])
    join_processes().wait_for_everyone()
    steps = read_facts(folder / _STEPS_NAME)
    stages = tuple(stage.model_copy(update={"steps": count}) for stage, count in zip(job.stages, steps, strict=True))
    return Job(job.name, job.source, job.target, stages)


class BlockOrder(Sequence[int]):
    """The places of blocks in the order in which training meets them, epoch after epoch.

    Each shuffled anew and drawn when it is come to.
    """

    def __init__(self, num_blocks: int, size: int, seed: int, first: int = 0) -> None:
        self.num_blocks, self.size, self.seed, self.first = num_blocks, size, seed, first
        self._epoch = -1
        self._generator = torch.Generator()
        self._places = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> BlockOrder: ...
    def __getitem__(self, index: int | slice) -> int | BlockOrder:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.size)
            assert step == 1
            return BlockOrder(self.num_blocks, max(0, stop - start), self.seed, self.first + start)
        if not 0 <= index < self.size:
            raise IndexError(index)
        epoch, place = divmod(self.first + index, self.num_blocks)
        if epoch < self._epoch or self._epoch < 0:
            self._generator.manual_seed(self.seed)
            self._epoch = -1
        while self._epoch < epoch:
            self._places = torch.randperm(self.num_blocks, generator=self._generator)
            self._epoch += 1
        return int(self._places[place])


def draw_order(num_blocks: int, count: int, seed: int) -> BlockOrder:
    """The order of `count` blocks by a seed."""
    return BlockOrder(num_blocks, count, seed)


def _load_teacher(dense: Path) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(Any, load_frozen(dense)).to(join_processes().device))


def _save(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    model.save_pretrained(target, state_dict=weights)
    complete_config(target)
    copy_companions(source, target)


@torch.inference_mode()
def measure_domains(mixture: Path, data: Path) -> DomainRouting | None:
    """How the held-out text of each domain is routed by a mixture.

    None where there are fewer than two domains with two blocks.
    """
    names, domains = read_domains(data, "test")
    blocks = read_blocks(data, "test")
    parts = {name: blocks[domains == number] for number, name in enumerate(names)}
    if len(parts) < 2 or min(map(len, parts.values())) < 2:
        return None
    model = load_frozen(mixture)
    cast(Any, model).to(join_processes().device)
    halves = {name: [_loads(model, part[half::2]) for half in (0, 1)] for name, part in parts.items()}
    wholes = {
        name: (len(part[0::2]) * halves[name][0] + len(part[1::2]) * halves[name][1]) / len(part)
        for name, part in parts.items()
    }
    pairs = [(wholes[a], wholes[b]) for place, a in enumerate(names) for b in names[place + 1 :]]
    return DomainRouting(
        {name: tuple(map(tuple, load.tolist())) for name, load in wholes.items()},
        _mean_distance(pairs),
        _mean_distance([(first, second) for first, second in halves.values()]),
    )


def _loads(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Load of each expert of each layer over blocks of token ids; float32 [layers, num_experts]."""
    logits: list[torch.Tensor] = []
    biases, gate = tuple(selection_biases(model)), find_gate(model.config)
    assert gate is not None, "load is measured of mixtures"
    handles = [
        router.register_forward_hook(lambda _, __, output: logits.append(output[0])) for router in router_modules(model)
    ]
    found = []
    try:
        for batch in blocks.split(EVALUATION_BATCH):
            logits.clear()
            model(input_ids=batch.to(model.device), use_cache=False)
            loads = [expert_load(z, gate, bias) for z, bias in zip(logits, biases, strict=True)]
            found.append(torch.stack(loads).cpu() * len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).sum(0) / len(blocks)


def _mean_distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
    """For each layer, half the sum of absolute differences of two loads [layers, num_experts], the mean over pairs."""
    return tuple((torch.stack([(a - b).abs().sum(-1) for a, b in pairs]).mean(0) / 2).tolist())
