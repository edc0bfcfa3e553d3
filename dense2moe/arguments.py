"""Arguments of the Python API, checked against their annotations."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from dense2moe.convert.recipe.wording import show_value
from dense2moe.upcycle.errors import UpcycleError

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
