"""Surgery: from a dense checkpoint, or several, to a mixture, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import torch

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.experts import (
    ElementMoments,
    add_noise,
    choose_neurons,
    measure_moments,
    redraw_neurons,
    seeded_generator,
)
from dense2moe.upcycle.building.merger import Merger
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Merged,
    Piece,
    RouterKeys,
    RouterRows,
    SelectionBias,
    Slice,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.read_back import check_contents
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.config_files import save_config
from dense2moe.upcycle.checkpoints.module_names import build_empty, name_for_files
from dense2moe.upcycle.checkpoints.reader import Checkpoint, copy_companions, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES, TensorEntry
from dense2moe.upcycle.checkpoints.writer import Content, Span, write_tensors
from dense2moe.upcycle.gates.start import draw_router
from dense2moe.upcycle.models.parts import AddOne, MultiplyByRootOfWidth
from dense2moe.upcycle.progress import Progress

GivenRouters = Mapping[int, torch.Tensor]
"""Router rows read from hidden states, float32 [rows, hidden] for each FFN that becomes experts, by its number."""


def upcycle(
    source: Path,
    output: Path,
    config: UpcycleConfig,
    seed: int,
    progress: Progress,
    routers: GivenRouters | None = None,
    plan: UpcyclePlan | None = None,
    sources: Mapping[str, Path] | None = None,
) -> UpcyclePlan:
    """Write the mixture of a dense checkpoint into an empty directory.

    Returns the plan that was carried out, which is made here unless it is given. `routers` are the rows of routers that
    are not drawn, `sources` the checkpoints fine-tuned from it whose FFNs become the experts. Memory does not grow with
    the model, nor with the number of sources: what changes nothing is copied by the kernel, and the rest passes in
    chunks of a few million weights, one source at a time.

    Raises:
        UpcycleError: the source cannot be upcycled (nothing is written then).
        OSError: the disk is full or not writable.
    """
    checkpoint = open_checkpoint(source)
    others = open_sources(checkpoint, sources or {})
    plan = plan or plan_upcycle(checkpoint, config, others)
    surgeon = _Surgeon((checkpoint, *others.values()), plan, seed, routers or {})
    save_config(plan.target_config, output)
    copy_companions(source, output)
    names = _name_for_files(plan, str(source))
    specs = [replace(write.spec, name=names[write.spec.name]) for write in plan.writes]
    contents = ((names[write.spec.name], surgeon.make(write)) for write in plan.writes)
    write_tensors(
        output, specs, contents, config.shard_bytes, report=lambda done, total: progress("writing tensors", done, total)
    )
    return plan


def _name_for_files(plan: UpcyclePlan, where: str) -> dict[str, str]:
    """What each tensor that is written is called in its file."""
    names = [write.spec.name for write in plan.writes]
    if not plan.conversion.keeps_rest:
        return {name: name for name in names}
    return name_for_files(build_empty(plan.target_config, plan.conversion.target.architecture, where), names)


class _Surgeon:
    """Makes the contents of target tensors.

    The first checkpoint is the base, the others are the plan's sources.
    """

    def __init__(
        self, checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int, routers: GivenRouters
    ) -> None:
        assert len(checkpoints) == 1 + len(plan.sources), "the plan is of other sources"
        self.checkpoints, self.config, self.seed, self.routers = checkpoints, plan.settings, seed, routers
        pieces = (piece for write in plan.writes for piece in write.pieces)
        self._merged = {piece.rows.source for piece in pieces if isinstance(piece, Merged)}
        self._merger = Merger(checkpoints, plan, seed)
        self._moments: dict[Slice, ElementMoments] = {}

    def make(self, write: Write) -> Iterator[Content]:
        """The contents of one target tensor, in the order of its bytes."""
        for number, piece in enumerate(write.pieces):
            key = f"{write.spec.name}.{number}" if len(write.pieces) > 1 else write.spec.name
            yield from self._make_piece(piece, write, key)

    def _make_piece(self, piece: Piece, write: Write, key: str) -> Iterator[Content]:
        dtype = write.spec.dtype
        match piece:
            case Keep(rows=rows, fold=None):
                yield self._span(rows)
            case Keep(rows=rows):
                for chunk in self._chunks(rows):
                    yield self._fold(chunk.to(torch.float32), piece, write).to(dtype)
            case Merged(rows=rows):
                for chunk in self._merger.merge(rows):
                    yield self._fold(chunk, piece, write).to(dtype)
            case ExpertPart():
                yield from self._make_part(piece, dtype, key)
            case Zeros(num_elements=count) | SelectionBias(num_elements=count):
                for start in range(0, count, 1 << 22):
                    yield torch.zeros(min(1 << 22, count - start), dtype=dtype)
            case RouterRows():
                yield self._make_router(piece, write.spec.shape[1], key).to(dtype)
            case RouterKeys(num_rows=count, repeat=repeat, std=std):
                keys = torch.randn(count, write.spec.shape[1], generator=seeded_generator(self.seed, key)) * std
                yield keys.repeat_interleave(repeat, dim=0).to(dtype)
            case _:
                assert_never(piece)

    def _fold(self, weight: torch.Tensor, piece: Keep | Merged, write: Write) -> torch.Tensor:
        match piece.fold:
            case AddOne():
                return weight + 1.0
            case MultiplyByRootOfWidth():
                return weight * float(write.spec.shape[-1] ** 0.5)
            case None:
                return weight

    def _make_part(self, part: ExpertPart, dtype: torch.dtype, key: str) -> Iterator[Content]:
        matrix, (first, last) = part.matrix, part.neurons
        stored = DTYPES[self._entry(matrix).dtype]
        changed = part.transposed or part.drop > 0 or part.noise > 0 or part.scale != 1.0 or stored != dtype
        whole = part.neuron_axis == 0 or (first, last) == (0, self._width(matrix))
        rows = matrix
        if part.neuron_axis == 0:
            rows = replace(matrix, start=matrix.start + first, stop=matrix.start + last)
        if not changed and whole and self.checkpoints[rows.checkpoint].is_stored(rows.source):
            yield self._span(rows)
            return
        if part.transposed:
            whole_matrix = torch.cat(list(self._chunks(matrix))).t().to(torch.float32)
            own = whole_matrix[first:last] if part.neuron_axis == 0 else whole_matrix[:, first:last]
            chunks, is_cut = iter([own]), True
        else:
            chunks, is_cut = self._chunks(rows), False
        moments = self._measure(matrix) if part.drop > 0 or part.noise > 0 else ElementMoments(0.0, 0.0)
        mask = choose_neurons(part.num_neurons, part.drop, seeded_generator(self.seed, f"neurons {part.expert}"))
        generator = seeded_generator(self.seed, key)
        position = 0
        for chunk in chunks:
            here = mask
            if part.neuron_axis == 0:
                here = mask[position : position + len(chunk)]
                position += len(chunk)
            elif not is_cut:
                chunk = chunk[:, first:last]
            yield self._alter(part, chunk, here, moments, generator).to(dtype)

    def _alter(
        self,
        part: ExpertPart,
        chunk: torch.Tensor,
        mask: torch.Tensor,
        moments: ElementMoments,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """A chunk as the expert has it, float32.

        A function of its own, so that nothing it makes is held while the next chunk is read.
        """
        exact = redraw_neurons(chunk.to(torch.float32), mask, part.neuron_axis, moments, generator)
        exact = add_noise(exact, part.noise, moments.std, generator)
        return exact * part.scale if part.scale != 1.0 else exact

    def _make_router(self, router: RouterRows, hidden_size: int, key: str) -> torch.Tensor:
        if router.std is None and router.site in self.routers:
            rows = self.routers[router.site]
            assert rows.shape == (router.num_rows, hidden_size)
        else:
            std = self.config.router.std if router.std is None else router.std
            generator = seeded_generator(self.seed, key)
            rows = draw_router(router.num_rows, hidden_size, self._input_length(router, hidden_size), std, generator)
        return rows.repeat_interleave(router.repeat, dim=0)

    def _input_length(self, router: RouterRows, hidden_size: int) -> float:
        """Root of the mean squared length of what the router reads.

        A norm without weights gives a variance of 1. Else taking the parts of a residual stream as independent.
        """
        squares = sum(self._row_square(norm) for norm in router.norms) if router.norms else float(hidden_size)
        if router.embedding is not None:
            rows = self.checkpoints[0].entries[router.embedding].num_rows
            squares += self._row_square(Keep(Slice(router.embedding, 0, rows)))
        return math.sqrt(squares)

    def _row_square(self, matrix: Keep) -> float:
        """Mean squared length of a matrix's rows; of a norm as applied."""
        moments = self._measure(matrix.rows)
        mean = moments.mean + 1.0 if isinstance(matrix.fold, AddOne) else moments.mean
        return (mean**2 + moments.std**2) * self._entry(matrix.rows).shape[-1]

    def _measure(self, matrix: Slice) -> ElementMoments:
        """Moments of an expert's matrix, or of a part as merged."""
        if matrix not in self._moments:
            merged = matrix.source in self._merged
            self._moments[matrix] = measure_moments(self._merger.merge(matrix) if merged else self._chunks(matrix))
        return self._moments[matrix]

    def _entry(self, rows: Slice) -> TensorEntry:
        return self.checkpoints[rows.checkpoint].entries[rows.source]

    def _width(self, matrix: Slice) -> int:
        return self._entry(matrix).shape[1]

    def _chunks(self, rows: Slice) -> Iterator[torch.Tensor]:
        return self.checkpoints[rows.checkpoint].read_chunks(rows.source, rows.start, rows.stop)

    def _span(self, rows: Slice) -> Span:
        entry = self._entry(rows)
        row_bytes = entry.num_bytes // entry.num_rows
        return Span(entry.file, entry.start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)


def check_written(
    source: Path,
    output: Path,
    plan: UpcyclePlan,
    seed: int,
    progress: Progress,
    routers: GivenRouters | None = None,
    sources: Mapping[str, Path] | None = None,
) -> int:
    """Compare every tensor on disk with the plan, bit by bit.

    Each is made once more for that.
    Returns how many there are.
    The logits of a router show only the experts that it chooses; this shows all of them.

    Raises:
        UpcycleError: a tensor on disk is not the one that was written.
    """
    base = open_checkpoint(source)
    surgeon = _Surgeon((base, *open_sources(base, sources or {}).values()), plan, seed, routers or {})
    written = open_checkpoint(output)
    for number, write in enumerate(plan.writes, 1):
        check_contents(written, write.spec.name, surgeon.make(write))
        progress("reading tensors back", number, len(plan.writes))
    return len(plan.writes)
