"""One model's training, phase by phase, resumed where it was killed.

A finished phase leaves its weights and its history in the scratch directory, an unfinished one its checkpoints, each in
a folder that `dense2moe.upcycle.durable` seals. The weights that come out are the same, bit for bit on one machine's
CPU.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from dense2moe.upcycle.building.projection import copy_projection
from dense2moe.upcycle.checkpoints.class_heads import put_head
from dense2moe.upcycle.checkpoints.config_files import complete_config
from dense2moe.upcycle.checkpoints.pooling_files import complete_pooling
from dense2moe.upcycle.checkpoints.reader import copy_companions, read_config
from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.chats import TEMPLATE_NAME
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.durable import RECORD_NAME, begin, discard, is_kept, keep, read_facts
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import MASK, Examples
from dense2moe.upcycle.tasks.head import VECTORS
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.events import write_events
from dense2moe.upcycle.training.frozen import load_frozen, load_stored, stored_dtype
from dense2moe.upcycle.training.history import HISTORY_NAME, ModelName, Step, read_history, write_history
from dense2moe.upcycle.training.order import Grouping, draw_order
from dense2moe.upcycle.training.phase import Phase, Trained
from dense2moe.upcycle.training.phase_run import run_phase
from dense2moe.upcycle.training.processes import join_processes, whole
from dense2moe.upcycle.training.prompt import PARAMETER, PROMPT_DIRECTORY, get_prompt, write_prompt

EVENTS_DIRECTORY = "tensorboard"
_TRAINED_NAME = "trained"  # a finished phase, beside its checkpoints
_STEPS_NAME = "steps"
_RESULTS = ("best_step", "last_step", "seconds", "compute_seconds")  # of `Trained`, kept beside the weights


@dataclass(frozen=True)
class Job:
    """One model to train: name, source, target and phases' settings.

    `trial` names one of several trainings of the same model, of which one will count.
    """

    name: ModelName
    source: Path
    target: Path
    phases: tuple[FinetuneConfig, ...]
    trial: str = ""

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(settings.steps for settings in self.phases)


@dataclass(frozen=True)
class Setup:
    """What all models of a fine-tuning share.

    sparse_layers: numbers of the layers that have experts in the mixture. data: the blocks. scratch: where a killed run
    resumes. domain: the only domain whose blocks are met; all of them where none is named.
    """

    sparse_layers: tuple[int, ...]
    data: Path
    scratch: Path
    precision: str
    seed: int
    task: Task = NEXT_TOKEN
    domain: str | None = None

    def read(self, split: Split) -> Examples:
        """The blocks of a split that training may meet."""
        examples = read_examples(self.data, split)
        if self.domain is None:
            return examples
        names, _ = read_domains(self.data, split)
        return examples.of_domain(names.index(self.domain))


def train_model(job: Job, setup: Setup, teacher: Path | None, progress: Progress) -> Trained:
    """Train one model through its phases, and save it.

    A phase that an earlier run finished is not run again. `teacher` is a checkpoint to distil from.
    """
    folder = setup.scratch / f"{job.name} {job.trial}".strip().replace(",", "").replace(" ", "-")
    job = _settle(job, folder)
    loaded_teacher = _load_teacher(teacher, setup.task) if teacher else None
    source, first_step, best_step = job.source, 0, 0
    seconds = compute_seconds = 0.0
    history: list[Step] = []
    for planned in _plan_phases(job, setup):
        phase = replace(planned, first_step=first_step)
        place = folder / f"phase-{phase.number}"
        finished = place / _TRAINED_NAME
        if not is_kept(finished):
            if join_processes().is_main_process:
                for later in range(phase.number + 1, len(job.phases)):
                    discard(folder / f"phase-{later}")  # it went on from what is made again here
            model = load_stored(source, setup.task.name, setup.task.head)
            result = run_phase(model, loaded_teacher, phase, place / "checkpoints", progress)
            release_memory()  # the Trainer and its callbacks hold each other, and the optimizer's state with them
            if join_processes().is_main_process:
                _keep_trained(model, result, job.source, finished)
            join_processes().wait_for_everyone()
        if join_processes().is_main_process:
            discard(place / "checkpoints")  # also those of a run that was killed before this
        facts = read_facts(finished)
        history += read_history(finished / HISTORY_NAME)
        if facts["best_step"] > first_step:  # otherwise the weights are those that the phase began with
            best_step = facts["best_step"]
        source, first_step = finished, facts["last_step"]
        seconds, compute_seconds = seconds + facts["seconds"], compute_seconds + facts["compute_seconds"]
    if join_processes().is_main_process:
        _write_target(job, source, setup, history)
    join_processes().wait_for_everyone()
    return Trained(tuple(history), best_step, first_step, seconds, compute_seconds)


def load_shape(directory: Path, task: Task) -> PreTrainedModel:
    """The model of a checkpoint without its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        # a shared expert of width 0
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if task.head is not None:
            config = put_head(config, task.name, task.head, directory)
        return cast(PreTrainedModel, task.model_class.from_config(config))


def _settle(job: Job, folder: Path) -> Job:
    """The job with the steps that it was begun with.

    Measured seconds decide them, and would be others on the next start.
    """
    if join_processes().is_main_process and not is_kept(folder / _STEPS_NAME):
        begin(folder)  # what is left of other steps is of no use
        keep(folder / _STEPS_NAME, [settings.steps for settings in job.phases])
    join_processes().wait_for_everyone()
    steps = read_facts(folder / _STEPS_NAME)
    phases = (settings.model_copy(update={"steps": count}) for settings, count in zip(job.phases, steps, strict=True))
    return replace(job, phases=tuple(phases))


def _plan_phases(job: Job, setup: Setup) -> list[Phase]:
    """A job's phases, all from step 0.

    Where the previous phase ends is not known yet.
    """
    train, validation = setup.read("train"), setup.read("validation")
    num_domains = len(read_domains(setup.data, "train")[0])
    sizes = [settings.steps * settings.batch_size for settings in job.phases]
    order = draw_order(len(train), sum(sizes), setup.seed, _group(train, job.phases[0]))
    last = torch.float32 if job.phases[-1].dtype == "float32" else stored_dtype(job.source)
    return [
        Phase(
            model=job.name,
            number=number,
            settings=settings,
            train=train,
            validation=validation,
            num_domains=num_domains,
            first_step=0,
            total_steps=job.num_steps,
            sparse_layers=setup.sparse_layers,
            precision=setup.precision,
            seed=setup.seed,
            order=order[sum(sizes[:number]) : sum(sizes[: number + 1])],
            dtype=last if number + 1 == len(job.phases) else torch.float32,
            task=setup.task,
        )
        for number, settings in enumerate(job.phases)
    ]


def _group(examples: Examples, settings: FinetuneConfig) -> Grouping | None:
    """How examples of different lengths come together.

    None where all have one length, or it is switched off.
    """
    padded = MASK in examples.tensors and settings.group_by_length
    return Grouping(examples.lengths, settings.batch_size) if padded else None


def _load_teacher(directory: Path, task: Task) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(Any, load_frozen(directory, task.name, task.head)).to(join_processes().device))


def _keep_trained(model: PreTrainedModel, result: Trained, source: Path, directory: Path) -> None:
    """Write a phase's model, prompt and history, and seal the directory."""
    begin(directory)
    passed_over = {*model.all_tied_weights_keys, PARAMETER}
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items() if name not in passed_over}
    _save(model, weights, source, directory)
    if (prompt := get_prompt(model)) is not None:
        write_prompt(prompt, model, directory / PROMPT_DIRECTORY)
    write_history(directory / HISTORY_NAME, result.history)
    keep(directory, {name: getattr(result, name) for name in _RESULTS})


def _save(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    model.save_pretrained(target, state_dict=weights)
    complete_config(target)
    copy_companions(source, target)
    copy_projection(source, target)


def _write_target(job: Job, trained: Path, setup: Setup, history: list[Step]) -> None:
    """Copy the last phase's model to its place.

    The chat template or the pooling that it learned by goes along; TensorBoard's events where they are wanted.
    """
    ignored = shutil.ignore_patterns(RECORD_NAME, HISTORY_NAME)
    shutil.copytree(trained, job.target, dirs_exist_ok=True, ignore=ignored)
    if setup.task.name == VECTORS:
        complete_pooling(job.target, read_config(job.target).hidden_size)
    if (template := setup.data / TEMPLATE_NAME).is_file():
        shutil.copyfile(template, job.target / TEMPLATE_NAME)
    if any(settings.tensorboard for settings in job.phases):
        told = [step for step in history if job.phases[step.phase].tensorboard]
        write_events(job.target / EVENTS_DIRECTORY, told)
