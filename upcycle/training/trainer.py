"""The Trainer of transformers, with a phase's losses, rates and checkpoints.

The Trainer, on accelerate, runs the loop, so that one process and many are the same code: it divides batches, gathers
gradients over parts and processes, clips, casts, and brings random numbers, optimizer and data back to where a killed
run was. Ours are what it is asked for through its own methods, each a few lines here:

1. the order of the blocks, one list for the whole phase drawn from the seed, so that it depends neither on the number
   of processes nor on where a killed run is resumed;
2. the loss: the task's, a teacher's, and the routers' (`routing`);
3. the optimizer's groups and the schedule (`trainable`, `schedule`);
4. what a checkpoint holds (`resumable`), and when it is whole (`watch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments

from dense2moe.upcycle.memory import release_growth
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import IDS, MASK, Examples, trim
from dense2moe.upcycle.training.evaluation import judge_model
from dense2moe.upcycle.training.footprint import keeps_much
from dense2moe.upcycle.training.loss_parts import LossParts
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.prompt import get_prompt, run_with_prompt
from dense2moe.upcycle.training.resumable import count_steps, load_optimizer, load_weights, save_optimizer, save_weights
from dense2moe.upcycle.training.routing import Routing
from dense2moe.upcycle.training.schedule import schedule_share
from dense2moe.upcycle.training.sharding import divide_by, is_divided
from dense2moe.upcycle.training.trainable import parameter_groups
from dense2moe.upcycle.training.watch import TrainingWatch

# What transformers calls it, before 5.23 and since.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


class PhaseTrainer(Trainer):
    """A Trainer of one phase.

    A model without routers trains on the same tokens at the same rates.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, phase: Phase, scratch: Path, progress: Progress
    ) -> None:
        self.mixture, self.teacher, self.phase = model, teacher, phase
        self.routing = Routing(model, phase.settings, phase.num_domains, phase.sparse_layers)
        self.parts = LossParts()
        self.step_parts: Sequence[dict[str, Any]] = ()
        super().__init__(
            model=model,
            args=_arguments(phase, scratch, recomputes_layers(model, phase)),
            train_dataset=_Blocks(phase.train, phase.order),
            eval_dataset=_Blocks(phase.validation),
            data_collator=_collate,
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(transformers.PrinterCallback)
        self.watch = TrainingWatch(self, scratch, progress)
        self.add_callback(self.watch)

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP the model is divided, on CPUs too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = is_divided()
        if self.is_fsdp_enabled:
            divide_by(self.accelerator)

    # A step: its parts, the loss of each, and what follows the optimizer.

    def get_batch_samples(self, *arguments: Any) -> Any:
        """The parts of the next step, and their number of items."""
        samples = super().get_batch_samples(*arguments)
        self.step_parts = samples[0]
        self.routing.begin_step(len(self.step_parts), self.state.global_step / self.phase.settings.steps)
        return samples

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The task's loss, mixed with distillation, plus the routers' losses."""
        task, distillation = self.phase.task, self.phase.settings.distillation
        self._tell(inputs)
        if self.routing.needs_count:
            unread = partial(model, **task.unread)
            self.routing.count_ahead(partial(self._predict_part, unread, part) for part in self.step_parts)
            self._tell(inputs)  # as counting told of the other parts
        with self.routing.listening():
            predictions = self._predict(model, inputs)
        self.routing.count()
        loss = self.parts.note("train_loss", task.loss(predictions, inputs))
        if self.teacher is not None and distillation is not None:
            with torch.inference_mode():
                given = task.predictions(self.teacher(**task.inputs(inputs)))
            divergence = task.divergence(predictions, given.clone(), distillation.temperature, inputs)
            self.parts.note("distillation_loss", divergence)
            loss = (1 - distillation.weight) * loss + distillation.weight * divergence
        for each in self.routing.losses():
            loss = loss + each.coefficient * self.parts.note(each.name, each.value)
        return loss

    def _tell(self, batch: dict[str, Any]) -> None:
        """Tell the routing whose examples come next, and which tokens are real."""
        size = batch[IDS][0].numel() if IDS in batch else self.phase.train.block_size
        self.routing.tell(batch["domains"], size, batch.get(MASK))

    def _predict(self, call: Any, batch: dict[str, Any]) -> torch.Tensor:
        task = self.phase.task
        return run_with_prompt(call, self.mixture, task.inputs(batch), get_prompt(self.mixture), task.predictions)

    def _predict_part(self, call: Any, part: dict[str, Any]) -> torch.Tensor:
        batch = cast(Any, self)._prepare_inputs(part)
        self._tell(batch)
        return self._predict(call, batch)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """One part of a step; frees what it computed on the way."""
        loss: torch.Tensor = super().training_step(*arguments, **keywords)
        self.routing.let_go()
        return loss

    def end_step(self) -> None:
        """Move the selection biases after the optimizer's step."""
        if (balance := self.routing.end_step()) is not None:
            self.parts.note("balance_loss", balance)

    # An evaluation on the validation split.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The plain task loss on the validation examples, and the first figure.

        Every process computes it, routed as in training.
        """
        self.mixture.eval()
        task = self.phase.task

        def tell(examples: Examples) -> None:
            # what steps leave free in the heap would lie beside the logits of more blocks than a step's
            release_growth()
            read = examples.batch()
            size = read[IDS][0].numel() if IDS in read else examples.block_size
            self.routing.tell(examples.domains.to(self.mixture.device), size)

        held_out = judge_model(self.mixture, self.phase.validation, task, get_prompt(self.mixture), tell)
        metrics = {f"{metric_key_prefix}_loss": held_out.loss}
        if task.stops_by_figure:
            metrics[f"{metric_key_prefix}_figure"] = held_out.figures(task)[0].value
        self.mixture.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Learning rates.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `parameter_groups`."""
        groups = parameter_groups(self.mixture, self.phase.settings, self.phase.sparse_layers)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up, then the phase's schedule."""
        settings = self.phase.settings
        share = partial(schedule_share, settings.schedule, settings.warmup_steps, num_training_steps)
        self.lr_scheduler = LambdaLR(optimizer or cast(torch.optim.Optimizer, self.optimizer), share)
        return self.lr_scheduler

    # What a checkpoint holds.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the phase changes."""
        assert output_dir is not None
        self.save_learned(Path(output_dir))

    def save_learned(self, directory: Path) -> None:
        """Write what the phase changes into a directory."""
        save_weights(self.mixture, self.routing.moving_biases(), directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.mixture, self.routing.moving_biases(), Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step < self.state.max_steps:  # after the last step nobody needs them
            save_optimizer(cast(torch.optim.Optimizer, self.optimizer), self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and count_steps(Path(checkpoint)) < self.phase.settings.steps:
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            load_optimizer(optimizer, self.lr_scheduler, Path(checkpoint), self.is_fsdp_enabled)

    def load_best(self) -> None:
        """Read back the best checkpoint's weights, if not in memory."""
        if self.watch.best_step != self.phase.first_step + self.state.global_step:
            self._load_from_checkpoint(str(self.watch.checkpoint(self.watch.best_step)))

    _load_best_model = load_best


class _Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Examples in training order."""

    def __init__(self, examples: Examples, order: Sequence[int] | None = None) -> None:
        self.examples, self.order = examples, range(len(examples)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place = int(self.order[index])
        tensors = {name: tensor[place] for name, tensor in self.examples.tensors.items()}
        return {**tensors, "domains": self.examples.domains[place]}


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Examples as one batch, no wider than its longest text."""
    return trim({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def recomputes_layers(model: PreTrainedModel, phase: Phase) -> bool:
    """Whether layers are computed a second time in the backward pass.

    As the settings say, where most weights are frozen, and for many inner values. Where most weights are frozen the
    second time takes no longer than the gradients of weights would, and inner values would be most of the memory.
    """
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        phase.settings.gradient_checkpointing
        or 2 * learning < sum(parameter.numel() for parameter in model.parameters())
        or keeps_much(model.config, phase.blocks_per_part * phase.train.block_size)
    )


def _arguments(phase: Phase, scratch: Path, recomputes: bool) -> TrainingArguments:
    settings = phase.settings
    eval_steps = min(settings.eval_steps, settings.steps)
    checkpointing: dict[str, Any] = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=phase.blocks_per_part,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        **(checkpointing if recomputes else {}),
        max_grad_norm=settings.max_grad_norm or 0.0,  # which clips none
        bf16=phase.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=phase.seed,
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
