"""The pipeline: one table of stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dense2moe.convert.preparation import Each, Facts, Preparation, StageRun
from dense2moe.convert.stages import branch, data, finetune, onnx, parity, quantize, report, source, upcycle


@dataclass(frozen=True)
class Input:
    """One input of a stage: its name, and which stage makes it.

    The stage may depend on the recipe.
    """

    name: str
    find_stage: Callable[[Preparation], str]


@dataclass(frozen=True)
class Stage:
    """One row of a pipeline.

    A name, what it reads, what decides its output, its function, and the code below it. An artifact is made anew where
    anything changes in the packages of `code`, or in the module of `run`.

    `each` says over what it is repeated. It reads the artifacts of the same item of stages that are repeated over the
    same; where it `gathers`, all artifacts of stages that are repeated over something else, by their labels.

    A stage that is `light` runs in the run's own process, any other in one of its own. Under `accelerate launch` the
    first process runs every stage, and the others help in those of `all_processes`, which are then run by the launched
    processes themselves.
    """

    name: str
    reads: tuple[str | Input, ...]
    settings: Callable[[Preparation, str | None], Facts]
    run: Callable[[StageRun], object]
    code: tuple[str, ...]
    each: Each | None = None
    gathers: bool = False
    all_processes: bool = False
    light: bool = False


_UPCYCLE = ("dense2moe.upcycle",)
_EXPORT = (*_UPCYCLE, "dense2moe.export")
_ALL = (*_EXPORT, "dense2moe.convert")
_EXPORTED = Input("exported", finetune.name_exported)

PIPELINE: tuple[Stage, ...] = (
    Stage("source", (), source.list_settings, source.run_stage, _UPCYCLE, light=True),
    Stage("data", ("source",), data.list_settings, data.run_stage, _UPCYCLE),
    Stage(
        "branch",
        ("source", "data"),
        branch.list_settings,
        branch.run_stage,
        _UPCYCLE,
        each="domain",
        all_processes=True,
    ),
    Stage("upcycle", ("source", "data", "branch"), upcycle.list_settings, upcycle.run_stage, _UPCYCLE, gathers=True),
    Stage(
        "finetune",
        ("source", "data", "branch", "upcycle"),
        finetune.list_settings,
        finetune.run_stage,
        _UPCYCLE,
        gathers=True,
        all_processes=True,
    ),
    Stage("quantize", ("data", _EXPORTED), quantize.list_settings, quantize.run_stage, _EXPORT, each="variant"),
    Stage("onnx", ("quantize",), onnx.list_settings, onnx.run_stage, _EXPORT, each="variant"),
    Stage(
        "parity",
        ("data", _EXPORTED, "quantize", "onnx"),
        parity.list_settings,
        parity.run_stage,
        _EXPORT,
        each="variant",
    ),
    Stage(
        "report",
        ("source", "data", "branch", "upcycle", "finetune", "quantize", "onnx", "parity"),
        report.list_settings,
        report.run_stage,
        _ALL,
        gathers=True,
        light=True,
    ),
)
