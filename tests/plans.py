"""Plans and refusals of tiny checkpoints, for tests of the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, SPARSE, UNTIED, Becomes
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import CONVERSIONS

MakeDense = Callable[..., Path]
T5 = "T5ForConditionalGeneration"
TOP_1: dict[str, Any] = {"num_experts_per_tok": 1}


def name_of(row: Conversion) -> str:
    return f"{row.family.model_type}->{row.target.model_type}"


def becomes(row: Conversion) -> Becomes:
    return FAMILIES[row.family.model_type].targets[row.target.model_type]


def talkative(row: Conversion) -> dict[str, Any]:
    """A source of this family that says something in every field that the target can hold."""
    return {**FAMILIES[row.family.model_type].talkative, **becomes(row).says}


every_conversion = pytest.mark.parametrize("row", CONVERSIONS, ids=name_of)


def quiet(what: str, done: int, total: int) -> None:
    pass


def plan(directory: Path, **settings: Any) -> UpcyclePlan:
    return plan_upcycle(open_checkpoint(directory), UpcycleConfig(**{"num_experts": 4, **settings}))


def refusal(directory: Path, tmp_path: Path, **settings: Any) -> str:
    """The one line with which the surgery ends before it writes anything."""
    output = tmp_path / "refused"
    output.mkdir()
    with pytest.raises(UpcycleError) as excinfo:
        upcycle(directory, output, UpcycleConfig(**{"num_experts": 4, **settings}), 0, quiet)
    assert list(output.iterdir()) == []
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def source_of(architecture: str, **fields: Any) -> PreTrainedConfig:
    """A dense config of this class of models."""
    return getattr(transformers, architecture).config_class(architectures=[architecture], **fields)


def refusal_of(call: Callable[..., Any], *arguments: Any) -> str:
    """The one line with which a call ends."""
    with pytest.raises(UpcycleError) as excinfo:
        call(*arguments)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def edited(
    source: Path,
    target: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a checkpoint with other config fields, with some left out, and with other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "config.json"
    fields = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in without}))
    state = load_file(source / "model.safetensors")
    tensors(state)
    save_file(state, target / "model.safetensors")
    return target


def plans() -> Iterator[Any]:
    """Every conversion with every setting that its target can express, by hand.

    A conversion, a source, the settings. By default each setting once for each target, and every conversion with plain
    copies and of a talkative source.
    """
    seen: set[str] = set()
    for row in CONVERSIONS:
        target = row.target.model_type
        sparse = SPARSE[target]
        cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "copies": ({}, {}),
            "talkative": (talkative(row), {}),
        }
        if sparse.cut:
            cases["granular"] = ({}, {"experts": ExpertsConfig(kind="granular", granularity=2)})
            cases["split"] = ({}, {"experts": ExpertsConfig(kind="split"), "num_experts_per_tok": 3})
        if not row.experts.top_1:
            count = row.experts.min_experts
            cases["fewest experts"] = ({}, {"num_experts": count, "num_experts_per_tok": count})
        if row.family.model_type not in ("gemma", "t5"):
            cases["untied"] = (UNTIED, {})
        if sparse.partial:
            layers = {"num_layers": 5} if row.experts.top_1 else {"num_hidden_layers": 3}
            cases["partial"] = (layers, {"layers": "every-2"})
        if sparse.last:
            cases["last layers"] = ({"num_hidden_layers": 3}, {"layers": (1, 2)})
        if sparse.shared:
            cases["half"] = ({}, {"shared_expert": "half"})
            cases["zero"] = ({}, {"shared_expert": "zero"})
        if sparse.shared and sparse.cut:
            cases["half of granular"] = (
                {},
                {"shared_expert": "half", "experts": ExpertsConfig(kind="granular", granularity=2)},
            )
        for name, (source, settings) in cases.items():
            new = f"{target} {name}" not in seen
            seen.add(f"{target} {name}")
            mark = pytest.mark.every_family(default=new or name in ("copies", "talkative"))
            given = {"target": target, **sparse.settings, **settings}
            yield pytest.param(row, source, given, marks=mark, id=f"{name_of(row)} {name}")


def once_of_each(make_dense: MakeDense) -> MakeDense:
    """Checkpoints by what is asked of them, each made once. Read only."""
    made: dict[str, Path] = {}

    def find(row: Conversion, source: dict[str, Any]) -> Path:
        source = {**becomes(row).needs, **source}
        key = f"{row.family.architecture} {source}"
        if key not in made:
            made[key] = make_dense(architecture=row.family.architecture, **source)
        return made[key]

    return find
