"""Runs of training that several test files begin: their text, their settings, what they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.history import Step
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model
from dense2moe.upcycle.training.phase import Phase, Trained
from dense2moe.upcycle.training.phase_run import run_phase

BLOCK = 16
CONFIG = FinetuneConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    router_learning_rate=1e-2,
    warmup_steps=1,
    eval_steps=2,
    patience=99,
    precision="float32",
    control=False,
)
ROOT = Path(__file__).parent.parent


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", name="data")
def make_data(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains: letters, and digits."""
    directory = tmp_path_factory.mktemp("data")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 120), ("validation", 10), ("test", 10)):
        for domain, alphabet in (("letters", "abcdefgh"), ("digits", "01234567")):
            words = [" ".join(alphabet[i] * 2 for i in torch.randint(8, (12,), generator=draw)) for _ in range(count)]
            (directory / f"{domain}-{split}.txt").write_text("\n".join(words), encoding="utf-8")
    sources = {
        domain: TextData(
            kind="text",
            train=(f"{domain}-train.txt",),
            validation=(f"{domain}-validation.txt",),
            test=(f"{domain}-test.txt",),
            separator="\n",
        )
        for domain in ("letters", "digits")
    }
    config = DataConfig.model_validate({"source": {"kind": "domains", "domains": sources}, "block_size": BLOCK})
    prepare_data(dense_checkpoint, directory, config, directory, quiet)
    return directory


Start = Callable[..., tuple[FinetuneFacts, Path]]


@pytest.fixture(scope="module", name="start")
def make_start(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    def start(
        config: FinetuneConfig, scratch: Path | None = None, progress: Any = quiet, mixture: Path = mixture_checkpoint
    ) -> tuple[FinetuneFacts, Path]:
        output = tmp_path_factory.mktemp("output")
        scratch = scratch or tmp_path_factory.mktemp("scratch")
        return finetune(dense_checkpoint, mixture, data, output, config, 0, progress, scratch), output

    return start


TrainAlone = Callable[..., tuple[Trained, Path]]


@pytest.fixture(scope="module", name="train_alone")
def make_train_alone(mixture_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainAlone:
    """The training of a fine-tuning, without the measurements of the models before and after."""

    def train_alone(
        config: FinetuneConfig, scratch: Path | None = None, progress: Any = quiet, mixture: Path = mixture_checkpoint
    ) -> tuple[Trained, Path]:
        output = tmp_path_factory.mktemp("output")
        layers = sparse_layers(load_shape(mixture, NEXT_TOKEN))
        setup = Setup(layers, data, scratch or tmp_path_factory.mktemp("scratch"), config.precision, 0)
        return train_model(Job("fine-tuned", mixture, output, config.resolve_phases()), setup, None, progress), output

    return train_alone


def first_step(mixture: Path, data: Path, config: FinetuneConfig, scratch: Path) -> Step:
    """The history of one step on a batch of both domains; nothing is saved as a model."""
    examples = read_examples(data, "train")
    places = torch.linspace(0, len(examples) - 1, config.batch_size).long()
    batch = examples.take(places)
    settings = config.model_copy(update={"steps": 1, "warmup_steps": 0})
    model = load_model(mixture, torch.float32)
    phase = Phase("m", 0, settings, batch, batch, 2, 0, 1, (0, 1), settings.precision, 0)
    (step,) = (step for step in run_phase(model, None, phase, scratch, quiet).history if step.train_loss is not None)
    return step


@pytest.fixture(scope="module", name="reference")
def make_reference(train_alone: TrainAlone, mixture_checkpoint: Path) -> TrainAlone:
    """A training from its start to its end, made once for all that are compared with it. Shared: read only."""
    made: dict[tuple[str, Path], tuple[Trained, Path]] = {}

    def reference(config: FinetuneConfig, mixture: Path = mixture_checkpoint) -> tuple[Trained, Path]:
        key = (config.model_dump_json(), mixture)
        if key not in made:
            made[key] = train_alone(config, mixture=mixture)
        return made[key]

    return reference


BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module", name="biased")
def make_biased(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture like `mixture_checkpoint` whose gates have a selection bias. Shared: read only."""
    output = tmp_path_factory.mktemp("biased")
    experts, router = ExpertsConfig(noise=0.5), RouterConfig(logit_std=2.0)
    upcycle(
        dense_checkpoint,
        output,
        UpcycleConfig(target="glm4_moe", num_experts=4, experts=experts, router=router),
        0,
        quiet,
    )
    return output


def read_biases(directory: Path) -> torch.Tensor:
    """The biases of both layers [2, 4]."""
    found = weights(directory)
    return torch.stack([found[BIAS.format(layer)] for layer in (0, 1)])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


class Killed(BaseException):
    pass
