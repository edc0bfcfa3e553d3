"""What was written, read again from the disk and compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.writer import Content, Span, read_span
from dense2moe.upcycle.errors import UpcycleError


def check_contents(written: Checkpoint, name: str, contents: Iterable[Content]) -> None:
    """Compare a tensor on disk, bit by bit, with what was written.

    Raises:
        UpcycleError: the tensor on disk is another one.
    """
    entry = written.entries[name]
    position = entry.start
    for content in contents:
        for expected in (
            read_span(content) if isinstance(content, Span) else (content.contiguous().reshape(-1).view(torch.uint8),)
        ):
            found = torch.cat([*read_span(Span(entry.file, position, expected.numel())), expected[:0]])
            if not torch.equal(found, expected):
                raise UpcycleError(
                    f"{written.directory}: tensor '{name}' on disk is not what was written there; check the disk "
                    "and run again"
                )
            position += expected.numel()
    assert position == entry.start + entry.num_bytes, f"{name} was not compared to its end"
