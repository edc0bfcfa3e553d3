"""A branch: the dense model continued on one domain alone.

Branch-Train-MiX (Sukhbaatar et al. 2024): branches of one model need nothing of each other, so each can be trained on a
machine of its own; their FFNs become the experts of a mixture, everything else is merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.memory import release_growth
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.evaluation import losses_by_domain, take_blocks
from dense2moe.upcycle.training.facts import BranchFacts, Spent
from dense2moe.upcycle.training.flops import training_flops
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.history import HISTORY_NAME, write_history
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model
from dense2moe.upcycle.training.phase import Trained, check_repeats, check_settings
from dense2moe.upcycle.training.precision import choose_precision
from dense2moe.upcycle.training.processes import join_processes, on_main

_MOST_BLOCKS = 16  # of each domain that a branch is measured on


def train_branch(
    dense: Path,
    data: Path,
    domain: str,
    output: Path,
    config: BranchConfig,
    sparse_layers: tuple[int, ...],
    seed: int,
    progress: Progress,
    scratch: Path,
    task: Task = NEXT_TOKEN,
) -> BranchFacts:
    """Continue the checkpoint in `dense` on one domain's blocks.

    Writes the best weights, by the loss on the domain's validation split, and the history to `output`, an ordinary
    dense checkpoint. `sparse_layers` are the layers whose FFNs will be experts. What a killed run needs to go on is
    kept in `scratch`. Under `accelerate launch` every process calls this; the first one writes, and all of them return
    the same facts.

    Raises:
        UpcycleError: the loss became NaN or infinite, memory ran out, or the settings do not fit the data or the number
            of processes.
        OSError: the disk is full or not writable.
    """
    names, _ = read_domains(data, "test")
    assert domain in names, f"domain {domain!r} of {names}"
    shape = load_shape(dense, task)
    precision = choose_precision(config.precision, shape.config.model_type)
    setup = Setup(sparse_layers, data, scratch, precision, seed, task, domain)
    settings, train = config.as_phase(), setup.read("train")
    check_repeats(config.batch_size, len(train), "branch", f"domain '{domain}' in the training split")
    check_settings(shape, settings, len(names), "branch")
    some = take_blocks(read_examples(data, "test"), len(names), _MOST_BLOCKS)
    before = on_main(lambda: _measure(dense, some, names, f"evaluating dense for {domain}", progress, task))
    trained = train_model(Job("branch", dense, output, (settings,)), setup, None, progress)
    if join_processes().is_main_process:
        write_history(output / HISTORY_NAME, trained.history)
    after = on_main(lambda: _measure(output, some, names, f"evaluating branch {domain}", progress, task))
    num_tokens = trained.last_step * config.batch_size * train.block_size
    flops = num_tokens * training_flops(shape, settings, sparse_layers, train.block_size)
    return BranchFacts(
        num_blocks=len(some),
        before=before,
        after=after,
        best_step=trained.best_step,
        num_steps=trained.last_step,
        spent=Spent(num_tokens, flops, trained.seconds, trained.compute_seconds),
        precision=setup.precision,
        warnings=_warn(domain, trained, before, after),
    )


def _measure(
    directory: Path, some: Examples, names: tuple[str, ...], what: str, progress: Progress, task: Task
) -> dict[str, float]:
    """A dense checkpoint's losses by domain."""
    progress(what, 0, 1)
    model = load_frozen(directory, task.name)
    cast(Any, model).to(join_processes().device)
    found = losses_by_domain(model, some, names, task)
    del model
    release_growth()
    progress(what, 1, 1)
    return found


def _warn(domain: str, trained: Trained, before: dict[str, float], after: dict[str, float]) -> tuple[str, ...]:
    """Whether the branch learned nothing of its domain, in words."""
    mend = "lower branch.learning_rate, or give more text or steps"
    if trained.best_step == 0:
        return (
            f"branch {domain}: no evaluation on the domain's validation split was better than at the start, so its "
            f"expert is the dense model's FFN; {mend}",
        )
    if after[domain] > before[domain]:
        return (
            f"branch {domain}: its loss on the domain's test split is {after[domain]:.4f}, the dense model's "
            f"{before[domain]:.4f}; {mend}",
        )
    return ()
