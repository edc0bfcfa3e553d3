"""Faults to plant in decoder packages, ours and of other makers: a library of what parity must name.

A fault knows no names of nodes or weights. What it changes is found by what it is: rows of a matrix by their values in
the checkpoint that the package's weights stand for, however they lie in the file (transposed, stacked, packed, as
integers and scales); constants by the pattern of nodes that reads them; caches, masks, positions and logits by the
interface. So one function plants it in any graph and any variant.

    exported = Exported(source, twin, package)
    # `Inexpressible` where that graph cannot have it
    faulty = plant(exported, tmp_path, FAULTS["two experts swapped"], BLOCKS)
    lines = check_parity(ParitySubject(faulty.package, faulty.twin, faulty.source, BLOCKS, …), …).breaches
    named = FAULTS["two experts swapped"].is_named(lines[0])

`plant` also runs both packages on `BLOCKS`, and fails where a fault changes nothing or something else than it should.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import torch

from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.storage import MODEL_NAME
from tests.faults.changes import (
    change_an_attention_norm,
    change_an_ffn_norm,
    change_the_final_norm,
    change_the_temperature,
    drop_the_window,
    leave_weights_unnormalized,
    mix_rows_of_the_cache,
    quantize_the_router,
    raise_a_router_logit,
    raise_a_router_logit_behind_its_name,
    raise_epsilon,
    read_padding,
    repeat_an_embedding_row,
    scale_a_head_row,
    scale_logits_by_2_percent,
    scale_logits_by_a_thousandth,
    scale_one_expert_by_2_percent,
    scale_one_group,
    shift_positions_of_steps,
    shift_the_cache,
    shorten_the_cache,
    stretch_cached_keys_of_one_head,
    stretch_keys_of_one_head,
    stretch_values_of_one_head,
    swap_embedding_rows,
    swap_gate_and_up,
    swap_head_rows,
    swap_two_experts,
    take_another_rope_theta,
    take_the_wrong_pad_side,
    zero_a_row,
)
from tests.faults.graphs import Graph, Setting
from tests.faults.stores import Array

Way = Literal["prefill", "padding", "decode", "batch"]
WAYS: tuple[Way, ...] = ("prefill", "padding", "decode", "batch")
STEPS: tuple[Way, ...] = ("decode", "batch")
LEAST_EFFECT = 1e-5
"""Relative to the largest logit: a package in which a fault is planted differs by more, or the fault is none."""
MOST_SILENCE = 1e-6
"""And in a way of feeding that the fault should not touch by less."""


class Exported(NamedTuple):
    """A checkpoint, another with the very weights of the package, which may be the same, and the package."""

    source: Path
    twin: Path
    package: Path


@dataclass(frozen=True)
class Fault:
    """A fault in words, how it is planted, what a breach that names its place has in it.

    And the ways of feeding in which it shows.
    Every fault can be in every variant; of graphs that cannot have it `plant` raises `Inexpressible`.
    """

    words: str
    plant: Callable[[Graph], None]
    place: str
    shows: tuple[Way, ...] = WAYS

    def is_named(self, breach: str) -> bool:
        """Whether a breach, `provider: tier: message`, names the place in its message."""
        return re.search(self.place, breach.split(": ", 2)[-1]) is not None


_LAYER = r"layer 1\b"
_EXPERT = rf"{_LAYER}.*expert"
_ATTENTION = rf"{_LAYER}.*attention"
_EMBEDDING = r"embedding"
_HEAD = r"\bhead\b"
_CACHE = r"KV cache"
_PADDING = r"left padding"
_ALL = (
    Fault("two experts swapped", swap_two_experts, rf"{_EXPERT}.*\b0\b.*\b1\b"),
    Fault("gate and up swapped", swap_gate_and_up, _EXPERT),
    Fault("top-k weights not renormalized", leave_weights_unnormalized, rf"{_LAYER}|layer 0\b"),
    Fault("one expert's scale wrong by 2 %", scale_one_expert_by_2_percent, rf"{_EXPERT}.*\b2\b"),
    Fault("one group's scale wrong by half", scale_one_group, rf"{_EXPERT}.*\b2\b"),
    Fault("a row of zeros in an expert", zero_a_row, rf"{_EXPERT}.*\b2\b"),
    Fault("router quantized to 8 bits", quantize_the_router, rf"{_LAYER}, router"),
    Fault("0.05 added to a router logit", raise_a_router_logit, rf"{_LAYER}, router"),
    Fault(
        "0.05 added to a router logit behind its name",
        raise_a_router_logit_behind_its_name,
        rf"{_LAYER}, (router|expert)",
    ),
    Fault("rope theta wrong", take_another_rope_theta, r"layer 0\b.*(attention|position|rotary)"),
    Fault("window dropped", drop_the_window, r"window"),
    Fault("RMS epsilon 1e-4", raise_epsilon, r"norm|layer 0\b"),
    Fault("an attention norm's entry wrong by 1 %", change_an_attention_norm, _LAYER),
    Fault("an FFN norm's entry wrong by 1 %", change_an_ffn_norm, _LAYER),
    Fault("the final norm's entry wrong by 1 %", change_the_final_norm, rf"final norm|{_HEAD}"),
    Fault("keys of one head + 1 %", stretch_keys_of_one_head, _ATTENTION),
    Fault("values of one head + 1 %", stretch_values_of_one_head, _ATTENTION),
    Fault("attention temperature 1 %", change_the_temperature, _ATTENTION),
    Fault("two embedding rows swapped", swap_embedding_rows, _EMBEDDING),
    Fault("one wrong embedding row", repeat_an_embedding_row, _EMBEDDING),
    Fault("a head row × 1.1", scale_a_head_row, _HEAD),
    Fault("two head rows swapped", swap_head_rows, _HEAD),
    Fault("logits × 1.001", scale_logits_by_a_thousandth, rf"{_HEAD}|\blogits\b"),
    Fault("logits × 1.02", scale_logits_by_2_percent, rf"{_HEAD}|\blogits\b"),
    Fault("KV cache off by one", shift_the_cache, _CACHE, STEPS),
    Fault("KV cache one token short", shorten_the_cache, _CACHE, STEPS),
    Fault("cached keys of one head + 1 %", stretch_cached_keys_of_one_head, _CACHE, STEPS),
    Fault("row 1 reads row 0's cache", mix_rows_of_the_cache, rf"{_CACHE}|\brow", ("batch",)),
    Fault("wrong pad side", take_the_wrong_pad_side, _PADDING, ("padding",)),
    Fault("padding not masked", read_padding, _PADDING, ("padding",)),
    Fault("positions of decode steps + 1", shift_positions_of_steps, rf"{_CACHE}|position", STEPS),
)
FAULTS: dict[str, Fault] = {fault.words: fault for fault in _ALL}
"""Every fault by its words."""


def plant(
    exported: Exported, directory: Path, fault: Fault, blocks: torch.Tensor, setting: Setting | None = None
) -> Exported:
    """A package in `directory` with the fault.

    Its effect on ids `blocks` [N, S] is where it should be and nowhere else.

    Raises:
        Inexpressible: the graph cannot have it.
    """
    package = directory / "faulty"
    shutil.copytree(exported.package, package, ignore=shutil.ignore_patterns("*.data"))
    proto = onnx.load(exported.package / MODEL_NAME)
    setting = setting or Setting(tokens=find_tokens(blocks))
    fault.plant(Graph(proto, exported.twin, setting))
    onnx.save(proto, package / MODEL_NAME)
    effects = measure_effects(exported.package, package, blocks)
    # where inputs are rounded, a small change need not show in every text
    shown = max(effects[way] for way in fault.shows)
    assert shown > LEAST_EFFECT, f"'{fault.words}' changes nothing in {', '.join(fault.shows)}: {shown:.1e}"
    for way in set(WAYS) - set(fault.shows):
        assert effects[way] < MOST_SILENCE, f"'{fault.words}' changes {way} too, by {effects[way]:.1e}"
    return exported._replace(package=package)


def find_tokens(blocks: torch.Tensor) -> tuple[int, int]:
    """The two tokens that ids [N, S] have most often in their first row, so that a fault of theirs can be seen."""
    ids, counts = blocks[0].unique(return_counts=True)
    first, second = ids[counts.argsort(descending=True, stable=True)[:2]].tolist()
    return first, second


def measure_effects(right: Path, wrong: Path, blocks: torch.Tensor) -> dict[Way, float]:
    """How far apart the logits of two packages are, relative to the largest, in each way of feeding ids [N, S].

    No steps of a row cut a prefill's.
    """
    rows = tuple(map(tuple, blocks.tolist()))
    first, second = _feed_right(right, rows), _feed_ways(wrong, blocks)
    return {way: float(np.abs(first[way] - second[way]).max() / np.abs(first[way]).max()) for way in WAYS}


@lru_cache(maxsize=8)
def _feed_right(package: Path, rows: tuple[tuple[int, ...], ...]) -> dict[Way, Array]:
    """A package without a fault, which is beside every one with one."""
    return _feed_ways(package, torch.tensor(rows))


def _feed_ways(package: Path, blocks: torch.Tensor) -> dict[Way, Array]:
    decoder = Decoder(package, num_threads=1)
    return {way: _feed(decoder, way, blocks) for way in WAYS}


def _feed(decoder: Decoder, way: Way, blocks: torch.Tensor) -> Array:
    """Logits at real tokens: of prefills, or of the steps after one."""
    ids = blocks[: 1 if way in ("prefill", "decode") else 2].numpy()
    length, steps = ids.shape[1], 8
    mask = np.ones_like(ids)
    if way == "padding":
        mask[1, : length // 3] = 0
    cache = decoder.new_cache(*ids.shape)
    if way in ("prefill", "padding"):
        logits = decoder.run(cache, ids, mask)["logits"]
        return logits[mask.astype(bool)]
    decoder.run(cache, ids[:, : length - steps])
    return np.concatenate(
        [decoder.run(cache, ids[:, n : n + 1])["logits"] for n in range(length - steps, length)], axis=1
    )
