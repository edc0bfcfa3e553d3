"""Pooling of padded batches: each vector is that of its text alone, computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dense2moe.upcycle.checkpoints.pooling_files import complete_pooling, read_pooling
from dense2moe.upcycle.tasks.pooling import POOLS, Pooling, pool

BY_HAND: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "cls": lambda rows: rows[0],
    "max": lambda rows: torch.tensor([max(column) for column in zip(*(row.tolist() for row in rows), strict=True)]),
    "mean": lambda rows: sum(rows, torch.zeros(4)) / len(rows),
    "mean_sqrt_len_tokens": lambda rows: sum(rows, torch.zeros(4)) / math.sqrt(len(rows)),
    "weightedmean": lambda rows: (
        sum((n * row for n, row in enumerate(rows, 1)), torch.zeros(4)) / sum(range(len(rows) + 1))
    ),
    "lasttoken": lambda rows: rows[-1],
}
LENGTHS = (3, 1, 6)


def draw_hidden() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [3, 6, 4], large at padding, all negative where a largest of 0 would be seen."""
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    hidden = -torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    return hidden.masked_fill(mask[..., None] == 0, math.inf), mask


@pytest.mark.parametrize("modes", [*((mode,) for mode in POOLS), ("cls", "mean")])
@pytest.mark.parametrize("normalizes", [False, True])
def test_padding_is_in_no_vector(modes: tuple[str, ...], normalizes: bool) -> None:
    hidden, mask = draw_hidden()
    found = pool(hidden, mask, Pooling(modes, normalizes))
    for vector, states, length in zip(found, hidden, LENGTHS, strict=True):
        wanted = torch.cat([BY_HAND[mode](list(states[:length])) for mode in modes])
        torch.testing.assert_close(vector, wanted / wanted.norm() if normalizes else wanted)


def test_padding_on_the_left_is_in_no_vector_either() -> None:
    hidden, mask = draw_hidden()
    modes = Pooling(tuple(POOLS))
    torch.testing.assert_close(
        pool(hidden[:1, :3].flip(1), mask[:1, :3], modes),
        pool(torch.cat([torch.full((1, 3, 4), math.inf), hidden[:1, :3].flip(1)], 1), mask[:1].flip(1), modes),
    )


def test_settings_are_written_where_there_are_none_and_never_replaced(tmp_path: Path) -> None:
    complete_pooling(tmp_path, 16)
    modules = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    settings = tmp_path / "1_Pooling" / "config.json"
    assert json.loads(settings.read_text(encoding="utf-8"))["word_embedding_dimension"] == 16
    assert read_pooling(tmp_path) == Pooling(("mean",))
    settings.write_text('{"pooling_mode": "cls"}', encoding="utf-8")
    complete_pooling(tmp_path, 16)
    assert read_pooling(tmp_path) == Pooling(("cls",))
