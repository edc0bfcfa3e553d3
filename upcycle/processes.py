"""The processes that share one run under `accelerate launch`; one alone is a run like any other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

_PATIENCE = timedelta(days=30)  # the others wait while the first one does what only one can

Found = TypeVar("Found")


def join_processes() -> PartialState:
    """This process among the others; the first call meets them."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def tell(message: Found | None) -> Found:
    """What the first process says, in every process; the others give none."""
    state, said = join_processes(), [message]
    return cast(Found, broadcast_object_list(said)[0] if state.num_processes > 1 else said[0])


def on_main(function: Callable[[], Found]) -> Found:
    """What a function returns in the first process, in every process."""
    return tell(function() if join_processes().is_main_process else None)
