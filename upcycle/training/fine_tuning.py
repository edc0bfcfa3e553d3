"""A brief fine-tune of the mixture, beside its dense controls."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import count_experts, sparse_layers
from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.controls import Trainings, evaluate_domains
from dense2moe.upcycle.training.crossing import find_crossings
from dense2moe.upcycle.training.domain_routing import measure_domains
from dense2moe.upcycle.training.facts import NOTHING_SPENT, Evaluation, FinetuneFacts, Spent
from dense2moe.upcycle.training.history import HISTORY_NAME, ModelName, last_visits, write_history
from dense2moe.upcycle.training.job import Setup, load_shape
from dense2moe.upcycle.training.label_routing import measure_labels
from dense2moe.upcycle.training.limits import check_finetune
from dense2moe.upcycle.training.oracle import measure_oracle
from dense2moe.upcycle.training.phase import check_repeats, check_settings
from dense2moe.upcycle.training.precision import choose_precision
from dense2moe.upcycle.training.processes import join_processes, on_main
from dense2moe.upcycle.training.remarks import find_harm, find_imbalance
from dense2moe.upcycle.training.router_gradient import measure_router_gradient

_GRADIENT_BLOCKS = 2  # that the routers' task gradient is measured on


def finetune(
    dense: Path,
    mixture: Path,
    data: Path,
    output: Path,
    config: FinetuneConfig,
    seed: int,
    progress: Progress,
    scratch: Path,
    task: Task = NEXT_TOKEN,
    equal: bool = False,
    spent: Spent = NOTHING_SPENT,
) -> FinetuneFacts:
    """Fine-tune the checkpoint in `mixture` on the blocks in `data`.

    Writes the best weights (by validation loss) to `output`. The weights that training starts from are among those
    looked at, so what only harms leaves them as they are, with a warning.

    With `config.control` the checkpoint in `dense` is continued twice, on the same batches in the same order: for the
    same steps, into `output/control`, and for as many as take the mixture's floating-point operations, into
    `output/control-same-flops`; with several `control_rates` at the best of them. The history goes to
    `output/history.jsonl`. What a killed run needs to go on is kept in `scratch`, which the caller hands to
    `durable.discard_damage` before, and deletes when all is well.

    `spent` is what training took before the mixture was made, by its branches: the controls are given as much more, and
    the facts count it as the mixture's.

    With `equal` the mixture was shown to compute what `dense` does, by its receipt. It is read on a few held-out
    blocks, and where the losses are the same it has the dense model's figures.

    Under `accelerate launch` every process calls this, and `leave_processes` in the end; the first one writes, and all
    of them return the same facts.

    Raises:
        UpcycleError: the loss became NaN or infinite, memory ran out, or the settings do not fit the model, the data or
            the number of processes.
        OSError: the disk is full or not writable.
    """
    shape = load_shape(mixture, task)
    check_finetune(config, shape.config.num_hidden_layers)
    config = config.settle(len(read_domains(data, "train")[0]), count_experts(shape))
    phases = config.resolve_phases()
    _check_data(shape, config, phases, data)
    setup = Setup(
        sparse_layers(shape), data, scratch, choose_precision(config.precision, shape.config.model_type), seed, task
    )
    some = read_examples(data, "train").take(slice(_GRADIENT_BLOCKS))
    training = Trainings(dense, mixture, output, setup, config, progress, spent)
    training.evaluations |= _evaluate_untrained(dense, mixture, data, task, progress, equal)
    gradient = on_main(lambda: measure_router_gradient(mixture, some, task))
    training.run()
    trained, evaluations = training.trained, training.evaluations
    history = tuple(step for each in trained.values() for step in each.history)
    if join_processes().is_main_process:
        write_history(output / HISTORY_NAME, history)
    return FinetuneFacts(
        evaluations=evaluations,
        history=history,
        best_steps={name: each.best_step for name, each in trained.items()},
        num_steps={name: each.last_step for name, each in trained.items()},
        seconds={name: each.seconds for name, each in trained.items()},
        precision=setup.precision,
        router_task_gradient=gradient,
        domains=on_main(lambda: measure_domains(output, data, task)),
        oracle=on_main(lambda: measure_oracle(output, data, task)),
        sparse_layers=setup.sparse_layers,
        warnings=(*find_harm(trained, evaluations), *find_imbalance(history, gradient, phases)),
        compute_seconds={name: each.compute_seconds for name, each in trained.items()},
        flops=training.flops,
        control_rate=training.control_rate,
        spent=spent,
        router_losses=tuple(phase.router_losses for phase in phases),
        crossings=find_crossings(history),
        labels=on_main(lambda: measure_labels(output, data, task)),
        visits=last_visits(history),
    )


def measure_untrained(
    dense: Path,
    mixture: Path,
    data: Path,
    output: Path,
    progress: Progress,
    task: Task = NEXT_TOKEN,
    equal: bool = False,
) -> FinetuneFacts:
    """The facts of a run without fine-tuning.

    Held-out figures of the dense model and of the mixture, and an empty history in `output`; `equal` as in `finetune`.
    """
    evaluations = _evaluate_untrained(dense, mixture, data, task, progress, equal)
    if join_processes().is_main_process:
        write_history(output / HISTORY_NAME, ())
    return FinetuneFacts(
        evaluations,
        (),
        {},
        {},
        {},
        None,
        None,
        domains=on_main(lambda: measure_domains(mixture, data, task)),
        sparse_layers=sparse_layers(load_shape(mixture, task)),
        labels=on_main(lambda: measure_labels(mixture, data, task)),
    )


def _evaluate_untrained(
    dense: Path, mixture: Path, data: Path, task: Task, progress: Progress, equal: bool
) -> dict[ModelName, Evaluation]:
    """Held-out figures of the dense model and its untrained mixture."""

    def measure() -> dict[ModelName, Evaluation]:
        found = evaluate_domains(dense, data, "dense", progress, task)
        known: tuple[ModelName, Evaluation] | None = ("dense", found) if equal else None
        return {"dense": found, "upcycled": evaluate_domains(mixture, data, "upcycled", progress, task, known)}

    return on_main(measure)


def _check_data(shape: PreTrainedModel, config: FinetuneConfig, phases: tuple[FinetuneConfig, ...], data: Path) -> None:
    """Refuse settings that do not fit the model or the data.

    Raises:
        UpcycleError: the batch has too many copies of a block, or as `check_settings`.
    """
    names, domains = read_domains(data, "train")
    check_repeats(config.batch_size, len(domains), "finetune", "the training split")
    for settings in phases:
        check_settings(shape, settings, len(names))
