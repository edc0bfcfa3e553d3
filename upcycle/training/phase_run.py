"""A phase run: prepared, resumed where it was killed, and finished."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed

from dense2moe.upcycle.checkpoints.loaded import count_experts
from dense2moe.upcycle.durable import make
from dense2moe.upcycle.errors import UpcycleError, find_os_error, is_out_of_memory
from dense2moe.upcycle.memory import small_heap
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.expert_forward import use_sorted_experts
from dense2moe.upcycle.training.frozen import keep_narrow, narrow
from dense2moe.upcycle.training.low_rank import merge_low_rank, use_low_rank
from dense2moe.upcycle.training.phase import Phase, Trained, check_settings
from dense2moe.upcycle.training.processes import join_processes
from dense2moe.upcycle.training.resumable import describe_last, last_checkpoint
from dense2moe.upcycle.training.sharding import collect_model, is_divided
from dense2moe.upcycle.training.trainable import add_expert_dropout, choose_trainable
from dense2moe.upcycle.training.trainer import CHECKPOINTING, PhaseTrainer, recomputes_layers

_MORE_MEMORY = {
    "finetune": "raise finetune.gradient_accumulation_steps, set finetune.gradient_checkpointing",
    "branch": "lower branch.batch_size",
}


def run_phase(
    model: PreTrainedModel, teacher: PreTrainedModel | None, phase: Phase, scratch: Path, progress: Progress
) -> Trained:
    """Train `model` through one phase and leave its best weights in it.

    Checkpoints go to `scratch`, from where a killed run resumes. Whatever ends a phase early is one line that says
    where its last checkpoint is. Where FSDP divides the model, its weights are left in the first process alone.

    Raises:
        UpcycleError: as `check_settings`, the loss is NaN or infinite, or memory ran out.
        OSError: the disk is full.
    """
    check_settings(model, phase.settings, phase.num_domains, phase.key)
    scratch = scratch.absolute()
    with _one_line_errors(phase, scratch), _own_randomness(phase.seed), _lent(model, phase.settings):
        finish = choose_trainable(model, phase.settings, phase.sparse_layers)
        if count_experts(model):
            # The fastest on the CPU by benchmarks/finetune.py; not measured on CUDA.
            use_sorted_experts(model, recomputes=not recomputes_layers(model, phase))
        if is_divided():  # FSDP takes one dtype alone
            cast(Any, model).float()
        else:
            use_low_rank(model)
            keep_narrow(model)
        if join_processes().is_main_process:
            make(scratch)
        trainer = PhaseTrainer(model, teacher, phase, scratch, progress)
        last = last_checkpoint(scratch)
        while last is not None and not trainer.watch.resume(last):
            last = last_checkpoint(scratch, last)
        with trainer.routing.hooks(), small_heap(model):
            if trainer.watch.patience_is_over:  # it was killed between its last checkpoint and its end
                trainer.load_best()
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.is_fsdp_enabled:
            collect_model(model)
        watch = trainer.watch
        if not trainer.is_fsdp_enabled or join_processes().is_main_process:
            if learned := watch.best_step > phase.first_step:
                merge_low_rank(model, phase.dtype)
            finish(learned)
        narrow(model, phase.dtype, phase.model)
    return Trained(tuple(watch.history), watch.best_step, watch.history[-1].step, watch.seconds, watch.compute_seconds)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Context manager: all random generators start at the seed.

    The Trainer starts them the same way.

    Then they are where they were.
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
    """Context manager: experts drop activations and the model may change.

    Then all but its weights is as before.
    """
    uses_cache = getattr(model.config, "use_cache", None)  # the Trainer says no, which would be saved
    remove_dropout = add_expert_dropout(model, settings.expert_dropout)
    try:
        yield
    finally:
        remove_dropout()
        if getattr(model, f"is_{CHECKPOINTING}"):  # the Trainer switches it on, with a hook at the embedding
            getattr(model, f"{CHECKPOINTING}_disable")()
            model.disable_input_require_grads()
        if uses_cache is not None:
            model.config.use_cache = uses_cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@contextmanager
def _one_line_errors(phase: Phase, scratch: Path) -> Iterator[None]:
    """Context manager: a full disk or exhausted memory is one line.

    A full disk is an `OSError`; a lack of memory names the last checkpoint. A full disk is an `OSError`; a lack of
    memory names the last checkpoint.
    """
    try:
        yield
    except (MemoryError, RuntimeError, SafetensorError) as error:  # torch's own out-of-memory error is a RuntimeError
        if (refusal := find_os_error(error)) is not None:
            raise OSError(refusal.errno, str(refusal.strerror), refusal.filename or str(scratch)) from error
        if not is_out_of_memory(error):
            raise
        raise UpcycleError(
            f"{phase.key}: out of memory while training {phase.model}; {_MORE_MEMORY[phase.key]}, or lower "
            f"data.block_size{describe_last(scratch)}"
        ) from error
