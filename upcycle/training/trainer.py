"""One stage of training, by the Trainer of transformers.

The Trainer, on accelerate, runs the loop, so that one process and many are the same code. What is ours:

1. The order of the blocks is one list for the whole stage, drawn from the seed, so that it depends neither on the
   number of processes nor on where a killed run is taken up.
2. The balance loss is each layer's own, with the load of the whole batch, whichever processes share it and however many
   parts it is computed in. Its gradient in one part needs the load of those to come (a product of two means is no sum
   over parts), so a step of several parts begins with a forward pass of all of them without gradients, which only
   counts: about a quarter more time, and only where the loss has a weight.
3. Where a gate has a selection bias and its router learns, each step ends by moving the bias against the load of all
   its tokens: of all parts, of all processes, as the gate chose. No gradient reaches the bias, and no optimizer holds
   it. In a stage in which a router does not learn (`prompt`, `by-domain`, the first layers of `last-N`) its bias stays:
   it belongs to the scores that it was balanced for.
4. A checkpoint holds what learns and these biases, by their names in memory. The Trainer's own loses experts and
   routers when it is loaded: it looks for the names in memory, where experts are stacked, and the file has one tensor
   an expert. It is whole once it is sealed (`dense2moe.upcycle.durable`); older ones go after that.
5. The start is a candidate too: it is looked at before the first step, and what learns is kept as it was until a look
   is better.
6. Whatever ends a stage early is one line that says where its last checkpoint is.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import distributed
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dense2moe.upcycle.checkpoints.loaded import count_experts, router_modules, router_weights, selection_biases
from dense2moe.upcycle.checkpoints.writer import TensorSpec, write_tensors
from dense2moe.upcycle.durable import begin, discard, is_kept, keep, make, read_facts
from dense2moe.upcycle.errors import UpcycleError, find_os_error, is_out_of_memory
from dense2moe.upcycle.footprint import keeps_much
from dense2moe.upcycle.gates.balance import (
    balance_loss,
    chosen_load,
    describe_routing,
    expert_counts,
    expert_load,
    mean_scores,
    move_bias,
    z_loss,
)
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.memory import release_growth, small_heap
from dense2moe.upcycle.models.routing import find_gate
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.evaluation import EVALUATION_BATCH, held_out_loss
from dense2moe.upcycle.training.expert_forward import use_sorted_experts
from dense2moe.upcycle.training.frozen import keep_narrow, merge_low_rank, narrow, use_low_rank
from dense2moe.upcycle.training.history import ModelName, Step, read_history, write_history
from dense2moe.upcycle.training.objective import distillation_loss, next_token_loss
from dense2moe.upcycle.training.processes import fill, join_processes
from dense2moe.upcycle.training.prompt import get_prompt, run_with_prompt
from dense2moe.upcycle.training.sharding import (
    collect,
    collect_model,
    collect_optimizer,
    divide_by,
    fill_optimizer,
    gathered,
    is_divided,
    reshard,
)
from dense2moe.upcycle.training.trainable import (
    add_expert_dropout,
    choose_trainable,
    domain_experts,
    parameter_groups,
    stacked_weights,
)

# What transformers calls it, before 5.23 and since.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
_MIN_LR_SHARE = 0.1  # the cosine ends here, as in Llama's and OLMoE's recipes
_WEIGHTS_STEM = "learning"
_WEIGHTS_NAME = f"{_WEIGHTS_STEM}.safetensors"
_HISTORY_NAME = "history.jsonl"
_START_NAME = "start"  # beside the checkpoints: what learns, before the first step


@dataclass(frozen=True)
class Stage:
    """One stage of one model's training.

    Its settings, the blocks of each step in order, and where it stands in the whole.

    blocks: token ids, int64 [blocks, block_size]; domains: the domain of each, int64 [blocks]. order: the places of the
    blocks in the order in which they are met, as many as steps * batch_size; their own order where there is none.
    validation and validation_domains: as blocks, held out. dtype: what the weights are rounded to in the end.
    """

    model: ModelName
    number: int
    settings: FinetuneConfig
    blocks: torch.Tensor
    domains: torch.Tensor
    num_domains: int
    validation: torch.Tensor
    validation_domains: torch.Tensor
    first_step: int
    total_steps: int
    sparse_layers: tuple[int, ...]
    precision: str
    seed: int
    order: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Trained:
    """What training left besides the weights.

    The history, the step whose weights were kept, the last step, and the seconds in steps. The step is the one before
    the first where no look was better than the start. `compute_seconds` are the processor's, of all threads, so that
    they do not grow with what else the machine does; where a GPU computes, the clock's.
    """

    history: tuple[Step, ...]
    best_step: int
    last_step: int
    seconds: float
    compute_seconds: float


def run_stage(
    model: PreTrainedModel, teacher: PreTrainedModel | None, stage: Stage, scratch: Path, progress: Progress
) -> Trained:
    """Train `model` through one stage and leave its best weights in it.

    Checkpoints go to `scratch`, where a killed run is taken up again.
    Where FSDP divides the model, its weights are left in the first process alone.

    Raises:
        UpcycleError: as `check_settings`, the loss is no number, or memory ran out.
        OSError: the disk is full.
    """
    check_settings(model, stage.settings, stage.num_domains)
    with _one_line_errors(stage, scratch), _own_randomness(stage.seed), _lent(model, stage.settings):
        finish = choose_trainable(model, stage.settings, stage.sparse_layers)
        if next(router_modules(model), None) is not None:
            # The fastest on the CPU by benchmarks/finetune.py; not measured on CUDA.
            use_sorted_experts(model, recomputes=not _checkpoints_layers(model, stage))
        if is_divided():  # FSDP takes one dtype alone
            cast(Any, model).float()
        else:
            use_low_rank(model)
            keep_narrow(model)
        if join_processes().is_main_process:
            make(scratch)
        trainer = _StageTrainer(model, teacher, stage, scratch.absolute(), progress)
        last = _last_checkpoint(scratch.absolute())
        while last is not None and not trainer.watch.take_up(last):
            last = _last_checkpoint(scratch.absolute(), last)
        with _routing(trainer), small_heap(model):
            if trainer.watch.patience_is_over:  # it was killed between its last checkpoint and its end
                trainer.load_best()
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.is_fsdp_enabled:
            collect_model(model)
        watch = trainer.watch
        if not trainer.is_fsdp_enabled or join_processes().is_main_process:
            if learned := watch.best_step > stage.first_step:
                merge_low_rank(model, stage.dtype)
            finish(learned)
        narrow(model, stage.dtype, stage.model)
    return Trained(tuple(watch.history), watch.best_step, watch.history[-1].step, watch.seconds, watch.compute_seconds)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """For the length of a `with`.

    All generators of the process start at the seed, as the Trainer will have it; then they are where they were.
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def _lent(model: PreTrainedModel, settings: FinetuneConfig) -> Iterator[None]:
    """For the length of a `with`.

    Experts drop activations, and the model may be changed; then all but its weights is as before.
    """
    uses_cache = model.config.use_cache  # the Trainer says no, which would be saved
    remove_dropout = add_expert_dropout(model, settings.expert_dropout)
    try:
        yield
    finally:
        remove_dropout()
        if getattr(model, f"is_{_CHECKPOINTING}"):  # the Trainer switches it on, with a hook at the embedding
            getattr(model, f"{_CHECKPOINTING}_disable")()
            model.disable_input_require_grads()
        model.config.use_cache = uses_cache
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def check_settings(model: PreTrainedModel, settings: FinetuneConfig, num_domains: int) -> None:
    """Refuse what a stage cannot do with a model, of which the shape is enough.

    With the data or with this number of processes.

    Raises:
        UpcycleError: as `is_divided`, the batch does not divide by the number of processes, or the domains do not
            divide the experts.
    """
    is_divided()  # refuses what it cannot be
    processes = join_processes().num_processes
    if settings.batch_size % (settings.gradient_accumulation_steps * processes):
        raise UpcycleError(
            f"finetune.batch_size is {settings.batch_size}; it must be a multiple of gradient_accumulation_steps × "
            "processes, "
            f"which is {settings.gradient_accumulation_steps} × {processes}"
        )
    num_experts = count_experts(model)
    if settings.routing == "by-domain" and num_experts and (num_domains < 2 or num_experts % num_domains):
        raise UpcycleError(
            f"finetune: routing is by-domain, the data has {num_domains} domains and a layer {num_experts} experts; "
            "the domains must be 2 or "
            "more and divide the experts evenly; give data.source of kind 'domains'"
        )


def _last_checkpoint(scratch: Path, before: Path | None = None) -> Path | None:
    """The newest whole checkpoint, or the newest of those before one."""
    steps = {_count_steps(folder): folder for folder in scratch.glob("checkpoint-*") if is_kept(folder)}
    return max((item for item in steps.items() if before is None or item[0] < _count_steps(before)), default=(0, None))[
        1
    ]


def _count_steps(checkpoint: Path) -> int:
    """How many steps of the stage were done at a checkpoint."""
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextmanager
def _one_line_errors(stage: Stage, scratch: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, SafetensorError) as error:  # torch's own out-of-memory error is a RuntimeError
        if (refusal := find_os_error(error)) is not None:
            raise OSError(refusal.errno, str(refusal.strerror), refusal.filename or str(scratch)) from error
        if not is_out_of_memory(error):
            raise
        raise UpcycleError(
            f"finetune: out of memory while training {stage.model}; raise finetune.gradient_accumulation_steps, set "
            f"finetune.gradient_checkpointing, or lower data.block_size{_where_kept(scratch)}"
        ) from error


def _where_kept(scratch: Path) -> str:
    last = _last_checkpoint(scratch)
    return f"; the last good checkpoint is {last}" if last else ""


@contextmanager
def _routing(trainer: _StageTrainer) -> Iterator[None]:
    """For the length of a `with`.

    The trainer sees every router's logits, and overrules the routers where domains have experts of their own.
    """

    def watch(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> Any:
        if trainer.listens:
            trainer.router_logits.append(output[0])
        if trainer.forced is None:
            return None
        return (
            output[0],
            torch.full_like(trainer.forced, 1 / trainer.forced.shape[1], dtype=output[1].dtype),
            trainer.forced,
        )

    handles = [router.register_forward_hook(watch) for router in router_modules(trainer.mixture)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, blocks: torch.Tensor, domains: torch.Tensor, order: Sequence[int] | None = None) -> None:
        self.blocks, self.domains, self.order = blocks, domains, range(len(blocks)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place = int(self.order[index])
        return {"input_ids": self.blocks[place], "domains": self.domains[place]}


class _StageTrainer(Trainer):
    """The Trainer with a mixture's losses, rates and checkpoints.

    A model without routers trains with the same tokens and rates.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, stage: Stage, scratch: Path, progress: Progress
    ) -> None:
        self.mixture, self.teacher, self.stage = model, teacher, stage
        self.num_experts = count_experts(model)
        self.router_logits: list[torch.Tensor] = []
        self.listens = False
        self.routing: tuple[torch.Tensor, ...] = ()
        self.forced: torch.Tensor | None = None
        self.step_parts: list[dict[str, Any]] = []
        self.step_load: torch.Tensor | None = (
            None  # of the whole step, where it has several parts and its balance has a weight
        )
        self.shares: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # each part's loads and mean scores, where only their history is wanted
        self.counts: dict[int, torch.Tensor] = {}  # of the step so far, by the number of the router
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.loads: list[torch.Tensor] = []
        settings = stage.settings
        super().__init__(
            model=model,
            args=_arguments(stage, scratch, _checkpoints_layers(model, stage)),
            train_dataset=_Blocks(stage.blocks, stage.domains, stage.order),
            eval_dataset=_Blocks(stage.validation, stage.validation_domains),
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(transformers.PrinterCallback)
        self.watch = _Watch(self, scratch, progress, settings.patience)
        self.add_callback(self.watch)

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP the model is divided, on CPUs too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = is_divided()
        if self.is_fsdp_enabled:
            divide_by(self.accelerator)

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Remember the parts of the step that begins."""
        samples = super().get_batch_samples(*arguments)
        self.step_parts, self.step_load = samples[0], None
        return samples

    def _count_ahead(self, model: Any) -> torch.Tensor:
        """The load of a step before its first part, with the random numbers that its parts will draw.

        [layers, num_experts].
        """
        loads = []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []),
        ):
            for part in self.step_parts:
                ids = cast(Any, self)._prepare_inputs(part)["input_ids"]
                with self._listening():
                    run_with_prompt(partial(model, logits_to_keep=1), self.mixture, ids, get_prompt(self.mixture))
                loads.append(self._measure_load((None,) * len(self.routing)))
        return torch.stack(loads).mean(0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The next token's loss and the divergence from the teacher, mixed.

        Plus each layer's balance loss and z-loss, as means over layers.
        """
        ids, settings = inputs["input_ids"], self.stage.settings
        self.forced = self._experts_of(inputs["domains"])
        in_parts = len(self.step_parts) > 1
        if (
            self.num_experts
            and self.forced is None
            and in_parts
            and settings.balance_coefficient
            and self.step_load is None
        ):
            self.step_load = self._count_ahead(model)
        with self._listening():
            logits = run_with_prompt(model, self.mixture, ids, get_prompt(self.mixture))
        for number, bias in self._moving_biases().items():
            counts = expert_counts(self.routing[number], self.gate, bias)
            self.counts[number] = self.counts[number] + counts if number in self.counts else counts
        loss = self._note("train_loss", next_token_loss(logits, ids))
        if self.teacher is not None and settings.distillation is not None:
            with torch.inference_mode():
                given = self.teacher(input_ids=ids, use_cache=False).logits
            share = settings.distillation.weight
            divergence = self._note(
                "distillation_loss", distillation_loss(logits, given.clone(), settings.distillation.temperature)
            )
            loss = (1 - share) * loss + share * divergence
        if self.routing:
            self.loads.append(self._measure_load(selection_biases(self.mixture)))
        if self.routing and self.forced is None:
            if settings.balance_coefficient or not in_parts:
                loss = loss + settings.balance_coefficient * self._note("balance_loss", self._balance())
            else:
                self.shares.append(self._share())
            if settings.z_coefficient:
                loss = loss + settings.z_coefficient * self._note(
                    "z_loss", torch.stack([z_loss(z) for z in self.routing]).mean()
                )
        return loss

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """One part of a step.

        Then nothing refers to what it computed on the way, which a router's logits do as long as they have a gradient.
        """
        loss: torch.Tensor = super().training_step(*arguments, **keywords)
        self.routing = tuple(logits.detach() for logits in self.routing)
        return loss

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """For the length of a `with`, a forward pass: `routing` becomes what the routers say.

        A layer that is computed twice calls its router again in the backward pass: who kept that would keep all that
        the router was reached by.
        """
        self.listens = True
        try:
            yield
            self.routing = tuple(self.router_logits)
        finally:
            self.listens = False
            self.router_logits.clear()

    def _experts_of(self, domains: torch.Tensor) -> torch.Tensor | None:
        """The experts of each token of blocks of these domains; none where the routers decide."""
        if not self.num_experts or self.stage.settings.routing == "learned":
            return None
        block_size, count = self.stage.blocks.shape[1], self.gate.max_experts_per_token
        return domain_experts(domains, block_size, self.stage.num_domains, self.num_experts, count)

    def _measure_load(self, biases: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """Load of each expert of each layer over what all processes have just read.

        By the routers or what overrules them; [layers, num_experts].
        """
        if self.forced is None:
            pairs = zip(self.routing, biases, strict=True)
            loads = torch.stack([expert_load(z, self.gate, bias) for z, bias in pairs])
        else:
            loads = torch.stack([chosen_load(self.forced, z.shape[-1]) for z in self.routing])
        if join_processes().num_processes > 1:
            distributed.all_reduce(loads)
            loads /= join_processes().num_processes
        return loads

    def take_loads(self) -> torch.Tensor:
        """The mean load since the last call, over all parts of all steps and all processes; [layers, num_experts]."""
        loads, self.loads = self.loads, []
        return torch.stack(loads).mean(0)

    def _balance(self) -> torch.Tensor:
        """Mean over layers of each layer's balance loss, with the load of all processes and parts."""
        loads = self._measure_load((None,) * len(self.routing)) if self.step_load is None else self.step_load
        return torch.stack(
            [balance_loss(z, self.gate, load) for z, load in zip(self.routing, loads, strict=True)]
        ).mean()

    def _share(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a part adds to a balance loss that is only watched.

        Loads over all processes and its mean scores, [layers, num_experts] each.
        """
        scores = [mean_scores(z.detach(), self.gate) for z in self.routing]
        return self._measure_load((None,) * len(scores)), torch.stack(scores)

    def _moving_biases(self) -> dict[int, torch.Tensor]:
        """By the number of the router, the selection biases that move: those of routers that learn."""
        if not self.stage.settings.bias_step:
            return {}
        pairs = enumerate(zip(router_weights(self.mixture), selection_biases(self.mixture), strict=True))
        return {number: bias for number, (weight, bias) in pairs if bias is not None and weight.requires_grad}

    def end_step(self) -> None:
        """Note the balance of parts that only watched it.

        And move every selection bias by the tokens counted since the last step.
        """
        if self.shares:
            loads, scores = (torch.stack(each).mean(0) for each in zip(*self.shares, strict=True))
            self._note("balance_loss", loads.shape[-1] * (loads * scores).sum(-1).mean())
            self.shares = []
        for number, bias in self._moving_biases().items():
            counts = self.counts.pop(number)
            if join_processes().num_processes > 1:
                distributed.all_reduce(counts)
            move_bias(bias, counts, self.stage.settings.bias_step)

    @property
    def gate(self) -> Gate:
        """How tokens choose experts in every layer that has some."""
        gate = find_gate(self.mixture.config)
        assert gate is not None, "asked for the gate of a model without experts"
        return gate

    def _note(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.parts.setdefault(name, []).append(value.detach().float())
        return value

    def take_parts(self) -> dict[str, float]:
        """The mean of every part of the loss since the last call, over all processes."""
        found = {}
        for name, values in self.parts.items():
            mean = torch.stack(values).mean()
            if join_processes().num_processes > 1:
                distributed.all_reduce(mean)
                mean /= join_processes().num_processes
            found[name] = float(mean)
        self.parts = {}
        return found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The plain next-token loss on the validation blocks, by every process, routed as in training."""
        self.mixture.eval()
        total = 0.0
        for blocks, domains in zip(
            self.stage.validation.split(EVALUATION_BATCH),
            self.stage.validation_domains.split(EVALUATION_BATCH),
            strict=True,
        ):
            # what steps leave free in the heap would lie beside the logits of more blocks than a step's
            release_growth()
            self.forced = self._experts_of(domains.to(self.mixture.device))
            total += held_out_loss(self.mixture, blocks, get_prompt(self.mixture)) * len(blocks)
        metrics = {f"{metric_key_prefix}_loss": total / len(self.stage.validation)}
        self.mixture.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `parameter_groups`."""
        groups = parameter_groups(self.mixture, self.stage.settings, self.stage.sparse_layers)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up, then the stage's schedule."""
        settings = self.stage.settings
        shape = partial(schedule_share, settings.schedule, settings.warmup_steps, num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or cast(torch.optim.Optimizer, self.optimizer), shape
        )
        return self.lr_scheduler

    def _changing(self) -> dict[str, torch.Tensor]:
        """What the stage changes, by its name in memory: what learns, and the biases that move."""
        moving = {id(bias) for bias in self._moving_biases().values()}
        found: dict[str, torch.Tensor] = {name: p for name, p in self.mixture.named_parameters() if p.requires_grad}
        return found | {name: buffer for name, buffer in self.mixture.named_buffers() if id(buffer) in moving}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the stage changes, by its name in memory."""
        reshard(self.mixture)
        changing = collect(self._changing())
        if self.args.should_save:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in changing.items()]
            # One tensor after the other: safetensors' own writer makes a copy of them all.
            write_tensors(Path(output_dir), specs, changing.items(), sys.maxsize, stem=_WEIGHTS_STEM)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read back what `save_model` wrote."""
        reshard(self.mixture)
        changing = self._changing()
        with safe_open(Path(resume_from_checkpoint) / _WEIGHTS_NAME, framework="pt", backend="pread") as stored:
            assert set(stored.keys()) == changing.keys()
            for name, tensor in changing.items():
                fill(tensor, stored.get_tensor(name))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write both in one form, however many processes there are, and whether FSDP divides the state or not.

        After the last step neither.
        """
        if self.state.global_step >= self.state.max_steps:
            return
        state = collect_optimizer(cast(torch.optim.Optimizer, self.optimizer))
        if self.args.should_save:
            for name, content in ((OPTIMIZER_NAME, state), (SCHEDULER_NAME, cast(Any, self.lr_scheduler).state_dict())):
                with (Path(output_dir) / name).open(
                    "wb"
                ) as file:  # torch loses the reason of a failure where it opens the file itself
                    torch.save(content, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read back what `_save_optimizer_and_scheduler` wrote."""
        if checkpoint is not None and _count_steps(Path(checkpoint)) < self.stage.settings.steps:
            state = torch.load(
                Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=self.is_fsdp_enabled, weights_only=True
            )
            fill_optimizer(cast(torch.optim.Optimizer, self.optimizer), state)
            cast(Any, self.lr_scheduler).load_state_dict(
                torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            )

    def load_best(self) -> None:
        """Read back the weights of the best checkpoint, if they are not in memory."""
        if self.watch.best_step == self.stage.first_step + self.state.global_step:
            return
        self._load_from_checkpoint(str(self.watch.checkpoint(self.watch.best_step)))

    _load_best_model = load_best


def schedule_share(schedule: str, warmup_steps: int, total_steps: int, step: int) -> float:
    """Share of the peak learning rate at a step counted from 0.

    'inverse-sqrt' falls from the peak as the root of the steps since it (Vaswani et al. 2017, section 5.3, its warm-up
    being at least one step).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        offset = max(1, warmup_steps)
        return math.sqrt(offset / (offset + step - warmup_steps))
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return _MIN_LR_SHARE + (1 - _MIN_LR_SHARE) * falling


def _checkpoints_layers(model: PreTrainedModel, stage: Stage) -> bool:
    """Whether layers are computed a second time in the backward pass.

    As the settings say, where most weights are frozen, and for many inner values. Where most weights are frozen the
    second time takes no longer than the gradients of weights would, and inner values would be most of the memory.
    """
    settings = stage.settings
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_tokens = (
        settings.batch_size
        // settings.gradient_accumulation_steps
        // join_processes().num_processes
        * stage.blocks.shape[1]
    )
    return (
        settings.gradient_checkpointing
        or 2 * learning < sum(parameter.numel() for parameter in model.parameters())
        or keeps_much(model.config, num_tokens)
    )


def _arguments(stage: Stage, scratch: Path, checkpoints_layers: bool) -> TrainingArguments:
    settings = stage.settings
    eval_steps = min(settings.eval_steps, settings.steps)
    checkpointing: dict[str, Any] = {_CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size
        // settings.gradient_accumulation_steps
        // join_processes().num_processes,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        **(checkpointing if checkpoints_layers else {}),
        max_grad_norm=settings.max_grad_norm or 0.0,  # which clips none
        bf16=stage.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=stage.seed,
        train_sampling_strategy="sequential",  # the blocks come in the order that they are to be met in
        logging_steps=max(1, settings.steps // 50),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        # FSDP would keep whole gradients until the last part.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_divided()}},
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )


class _Watch(TrainerCallback):
    """Moves what the Trainer logs into our history, times the steps.

    And stops on a loss that is no number or no longer falls.
    """

    def __init__(self, trainer: _StageTrainer, scratch: Path, progress: Progress, patience: int) -> None:
        self.trainer, self.scratch, self.progress, self.patience = trainer, scratch, progress, patience
        self.history: list[Step] = []
        self.seconds = self.compute_seconds = 0.0
        self.began = self.began_computing = 0.0

    @property
    def best_step(self) -> int:
        """The step, counted over all stages, with the lowest validation loss.

        The first of equals, and so the start before all.
        """
        looks = [step for step in self.history if step.validation_loss is not None]
        return min(looks, key=lambda step: cast(float, step.validation_loss)).step

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is, which is counted over all stages."""
        done = step - self.trainer.stage.first_step
        return self.scratch / (f"checkpoint-{done}" if done else _START_NAME)

    @property
    def patience_is_over(self) -> bool:
        """Whether the last looks were all no better than one before them."""
        losses = [step.validation_loss for step in self.history if step.validation_loss is not None]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def take_up(self, checkpoint: Path) -> bool:
        """Go on from what a checkpoint has told, unless the best checkpoint that it tells of is gone."""
        self.history = list(read_history(checkpoint / _HISTORY_NAME))
        self.seconds, self.compute_seconds = read_facts(checkpoint)
        if is_kept(self.checkpoint(self.best_step)):
            return True
        self.history, self.seconds, self.compute_seconds = [], 0.0, 0.0
        return False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.history:
            start = self.scratch / _START_NAME
            if state.is_world_process_zero:
                begin(start)
            self.trainer.save_model(str(start))
            if state.is_world_process_zero:
                keep(start)
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = _now()
        self.began_computing = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = _now() - self.began
        self.seconds += seconds
        self.compute_seconds += seconds if torch.cuda.is_available() else time.process_time() - self.began_computing
        if state.global_step % args.eval_steps == 0 or state.global_step == state.max_steps:
            # What is logged at a checkpoint is complete there; and the last weights are a candidate too.
            control.should_log = control.should_evaluate = control.should_save = True
        stage = self.trainer.stage
        losses = (step.train_loss for step in reversed(self.history) if step.model == stage.model)
        loss = next((f": loss {loss:.3f}" for loss in losses if loss is not None), "")
        self.progress(f"training {stage.model}{loss}", stage.first_step + state.global_step, stage.total_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        parts = self.trainer.take_parts() if "loss" in logs else {}
        validation = logs.get("eval_loss")
        if not parts and validation is None:
            return
        stage = self.trainer.stage
        for value in (*parts.values(), validation):
            if value is not None and not math.isfinite(value):
                if state.global_step == 0:
                    raise UpcycleError(
                        f"finetune: the validation loss of {stage.model} is {value} before the first step of a "
                        "stage; it must be finite; "
                        "set finetune.precision: float32, or look for values in the checkpoint that overflow"
                    )
                raise UpcycleError(
                    f"finetune: the loss of {stage.model} is {value} at step {stage.first_step + state.global_step}; "
                    "lower finetune.learning_rate"
                    f"{_where_kept(self.scratch)}"
                )
        step = stage.first_step + state.global_step
        layers = self._describe() if parts and self.trainer.routing else ()
        num_tokens = step * stage.settings.batch_size * stage.blocks.shape[1]
        rate = logs.get("learning_rate")
        line = Step(
            stage.model,
            step,
            num_tokens,
            stage.number,
            **parts,
            validation_loss=validation,
            learning_rate=rate,
            layers=layers,
        )
        self.history.append(line)

    def _describe(self) -> Any:
        """How each layer routes.

        Its load over all that was read since the last call; entropy and margin over this process's last part.
        """
        stacked = (
            weights
            for layer in cast(Any, self.trainer.mixture.get_decoder()).layers
            for weights in _stacked_weights(layer)
        )
        biases, gate = selection_biases(self.trainer.mixture), self.trainer.gate
        return describe_routing(
            self.trainer.stage.sparse_layers, self.trainer.take_loads(), self.trainer.routing, stacked, biases, gate
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.patience_is_over

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        join_processes().wait_for_everyone()  # each has a file of random numbers in it
        if state.is_world_process_zero:
            checkpoint, best = (
                self.checkpoint(self.trainer.stage.first_step + state.global_step),
                self.checkpoint(self.best_step),
            )
            write_history(checkpoint / _HISTORY_NAME, self.history)
            keep(checkpoint, [self.seconds, self.compute_seconds])
            for folder in {*self.scratch.glob("checkpoint-*"), self.scratch / _START_NAME} - {checkpoint, best}:
                discard(folder)


def _stacked_weights(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The first matrices of a decoder layer's experts; every process must ask for them."""
    with gathered(layer):
        yield from (stacked_weights(module.experts) for module in layer.modules() if hasattr(module, "experts"))


def _now() -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def write_events(directory: Path, history: Iterable[Step]) -> None:
    """Write TensorBoard's events.

    Losses and rate of each step, and of each layer the largest and the smallest load, entropy, margin and cosine.
    """
    from tensorboardX import SummaryWriter  # an extra of its own

    with SummaryWriter(str(directory)) as writer:
        for step in history:
            _write_event(step, writer)


def _write_event(step: Step, writer: Any) -> None:
    scalars = {name: value for name, value in asdict(step).items() if isinstance(value, float)}
    for layer in step.layers:
        found = {"largest load": max(layer.load), "smallest load": min(layer.load), **asdict(layer)}
        scalars |= {f"layer {layer.number}/{name}": value for name, value in found.items() if isinstance(value, float)}
    for name, value in scalars.items():
        writer.add_scalar(name.replace(" ", "_"), value, step.step)
