"""Arguments of the Python API: checked by their annotations, and read."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from pydantic import ConfigDict, ValidationError, validate_call

from dense2moe.convert.recipe.wording import show_value
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.durable import discard_damage
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress

PathLike = str | Path

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse wrong arguments by the function's annotations, in one line.

    No work is done before.

    Raises:
        UpcycleError: by the function that comes of it: each wrong argument, what it is, and what it must be.
    """
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)

    @wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        try:
            return checked(*arguments, **keywords)
        except ValidationError as error:
            if error.title != function.__name__:  # of a record within
                raise
            raise UpcycleError(_describe(error, list(signature(function).parameters))) from None

    return call


def _describe(error: ValidationError, names: list[str]) -> str:
    """Each wrong argument by name.

    pydantic tells a positional argument by its place.
    """
    found = []
    for each in error.errors(include_url=False):
        first, *rest = each["loc"]
        place = [names[first] if isinstance(first, int) else first, *rest]
        must = each["msg"].replace("Input should", "must", 1)
        found.append(f"{'.'.join(map(str, place))} is {show_value(each['input'])}; {must}")
    return f"{error.title}: {'; '.join(found)}"


def keep_quiet(*_: object) -> None:
    """Progress that nobody sees."""


def read_given_blocks(data: PathLike | None, split: Split) -> torch.Tensor | None:
    """The blocks of a split; None where no data is given."""
    return None if data is None else read_blocks(Path(data), split)


def resume(scratch: PathLike, progress: Progress | None) -> Path:
    """What a killed call has kept, undamaged.

    What a power cut damaged is deleted.
    """
    discard_damage(Path(scratch), progress or keep_quiet)
    return Path(scratch)
