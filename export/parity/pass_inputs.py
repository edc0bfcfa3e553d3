"""Inputs that packages without a cache are judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dense2moe.export import names
from dense2moe.export.blocks import choose_blocks
from dense2moe.export.tracing.interface import Interface, find_interfaces

_ONE, _SEVERAL = 11, 24
"""Tokens of a single row, and of the longest of several: other lengths than were traced."""
_MOST_ROWS = 4


@dataclass(frozen=True)
class PassInputs:
    """Inputs by name, in words, and whether rows are padded."""

    words: str
    given: dict[str, torch.Tensor]
    is_padded: bool = False


def list_inputs(model: PreTrainedModel, seed: int, blocks: torch.Tensor | None = None) -> Iterator[PassInputs]:
    """Drawn rows, the same padded, and rows of text.

    Padded where the model reads a mask.

    Args:
        model: the twin, whose forward says what is read; of an encoder and a decoder, what the encoder reads.
        seed: of what is drawn.
        blocks: ids of text [N, S]; a few rows are taken evenly.
    """
    interface = find_interfaces(model)[0]
    generator = torch.Generator().manual_seed(seed)
    yield PassInputs("one row", _draw(model, interface, 1, _ONE, generator))
    several = _draw(model, interface, 3, _SEVERAL, generator)
    yield PassInputs("three rows", several)
    if names.ATTENTION_MASK not in several:
        return
    yield PassInputs("three rows, padded", _pad(several), is_padded=True)
    if blocks is not None:
        text = choose_blocks(blocks, _MOST_ROWS)[:, : interface.most_tokens]
        of_text = interface.make_inputs(*text.shape) | {names.INPUT_IDS: text}
        yield PassInputs(f"{len(text)} rows of text", of_text)
        yield PassInputs(f"{len(text)} rows of text, padded", _pad(of_text), is_padded=True)


def _draw(
    model: PreTrainedModel, interface: Interface, num_rows: int, length: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Noise, tokens, and text of two types; every token is real."""
    length = min(length, interface.most_tokens)
    given = interface.make_inputs(num_rows, length)
    for name, value in given.items():
        if value.is_floating_point():
            given[name] = torch.randn(value.shape, generator=generator)
        elif name == names.INPUT_IDS:
            size = int(model.config.get_text_config().vocab_size)
            given[name] = torch.randint(min(5, size - 1), size, value.shape, generator=generator)
        elif name == names.TOKEN_TYPE_IDS:
            given[name] = (torch.arange(length) >= length // 2).long().repeat(num_rows, 1)
    return given


def _pad(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with a mask.

    Every other row ends in the middle, and the third after two tokens.
    """
    mask = given[names.ATTENTION_MASK].clone()
    length = mask.shape[1]
    for row in range(1, len(mask)):
        mask[row, length // 2 if row % 2 else min(2, length - 1) :] = 0
    return given | {names.ATTENTION_MASK: mask}
