"""Training from Python: branches of a dense model, and mixtures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt

from dense2moe.arguments import PathLike, check_arguments, keep_quiet, resume
from dense2moe.new_directory import new_directory
from dense2moe.upcycle.building.choice import resolve_layers
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training import fine_tuning
from dense2moe.upcycle.training.branch import train_branch
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.facts import BranchFacts, FinetuneFacts
from dense2moe.upcycle.training.task_choice import choose_label_loss, choose_task


@check_arguments
def branch(
    dense: PathLike,
    data: PathLike,
    domain: str,
    output: PathLike,
    config: BranchConfig | None = None,
    *,
    layers: str | tuple[Annotated[int, Field(ge=0)], ...] = "all",
    seed: NonNegativeInt = 0,
    scratch: PathLike | None = None,
    progress: Progress | None = None,
) -> BranchFacts:
    """Continue a dense checkpoint on the text of one domain alone.

    Branches of one checkpoint need nothing of each other, so each can be trained on a machine of its own. Given to
    `upcycle` as `sources`, in the order of the domains, they become the experts of a mixture (Branch-Train-MiX).

    Args:
        dense: the dense checkpoint.
        data: a directory of `prepare_data`.
        domain: name of the domain in the data.
        output: new directory of the branch, an ordinary dense checkpoint, with `history.jsonl`.
        config: what learns, for how long and at which rate; 20 steps if not given.
        layers: layers whose FFNs will be experts, as in a recipe, where they alone learn.
        seed: seed of the order of blocks.
        scratch: directory of checkpoints: a killed call that is made again with the same arguments resumes there. The
            caller deletes it when all is well. Nothing is kept if not given.
        progress: called as the work goes on.

    Returns:
        Losses on every domain before and after, in nats; which step was kept; tokens, operations and seconds.

    Raises:
        MendableError: the data has no such domain, the loss became NaN or infinite, memory ran out, or settings, model
            and data do not fit together.

    Example:
        facts = branch("dense", "data", "text", "branched", BranchConfig(steps=2, batch_size=2))
        print(facts.before["text"], facts.after["text"], facts.best_step)
    """
    names, _ = read_domains(Path(data), "test")
    if domain not in names:
        raise UpcycleError(f"branch: domain is '{domain}'; the data in {data} has {', '.join(names)}; give one of them")
    counted = (config or BranchConfig()).count_steps(None, len(names))
    task, depth = choose_task(Path(dense)), int(read_config(Path(dense)).num_hidden_layers)
    chosen = resolve_layers(layers, depth)
    with new_directory(output) as directory, tempfile.TemporaryDirectory(dir=directory.parent) as own:
        kept = resume(scratch or own, progress)
        return train_branch(
            Path(dense), Path(data), domain, directory, counted, chosen, seed, progress or keep_quiet, kept, task
        )


@check_arguments
def finetune(
    dense: PathLike,
    mixture: PathLike,
    data: PathLike,
    output: PathLike,
    config: FinetuneConfig | None = None,
    *,
    seed: NonNegativeInt = 0,
    scratch: PathLike | None = None,
    progress: Progress | None = None,
) -> FinetuneFacts:
    """Fine-tune a mixture briefly, beside the dense model as its control.

    Args:
        dense: the dense checkpoint: parent of a distillation, and the control's start.
        mixture: the mixture's checkpoint.
        data: a directory of `prepare_data`; its labels, or else the mixture's head, say what is learned.
        output: new directory of the fine-tuned mixture, with `history.jsonl` and the controls.
        config: what learns, for how long and at which rate.
        seed: seed of the order of blocks and of dropout.
        scratch: directory of checkpoints: a killed call that is made again with the same arguments resumes there. The
            caller deletes it when all is well. Nothing is kept if not given.
        progress: called as the work goes on.

    Returns:
        Held-out losses and figures of each model (losses in nats), the history, which step was kept, seconds.

    Raises:
        MendableError: the loss became NaN or infinite, memory ran out, or settings, model and data do not fit together.

    Example:
        settings = FinetuneConfig(steps=2, warmup_steps=0, eval_steps=1, batch_size=2, control=False)
        facts = finetune("dense", "mixture", "data", "tuned", settings)
        print(facts.best_steps, facts.warnings)
    """
    with new_directory(output) as directory, tempfile.TemporaryDirectory(dir=directory.parent) as own:
        kept = resume(scratch or own, progress)
        settings = (config or FinetuneConfig(), seed, progress or keep_quiet, kept)
        task = choose_task(Path(mixture), Path(data), choose_label_loss(Path(data), settings[0]))
        return fine_tuning.finetune(Path(dense), Path(mixture), Path(data), directory, *settings, task=task)
