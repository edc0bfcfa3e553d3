"""Parity of encoders, and of models of images and sound.

They give everything in one pass, without a cache.

Beside each other run the package and its twin, the torch model with the package's own weights; where the package rounds
the inputs of its products to 8 bits, the twin rounds them the same (`RoundedInputs`). Four tiers:

1. `weights` and `files`, as of every package.
2. `layer`: each layer of the twin reads what the *graph's* layer before gave, and must give what the graph's gives;
   what follows the last layer reads the graph's last one. So an error is seen where it is made.
3. `outputs`: what the graph gives in the end, with nothing replaced, of one row, of several padded ones, of other sizes
   than were traced.
4. `rows`: each row of a batch alone, in the same graph.

Limits are measured, not fixed: the twin reads its inputs once more, moved by a few units of their last places. Where
nothing flips over a rounding that is float32's noise, and where something does it is as large as what the graph may
differ by. A thousandth of a rounding step is no error, and a changed constant is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import open_package
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.place import OUTSIDE
from dense2moe.export.parity.precision import find_precision
from dense2moe.export.parity.records import FilesCheck, WeightsCheck
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import check_weights
from dense2moe.export.quantization.simulation import RoundedInputs
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.tracing.interface import find_interface
from dense2moe.upcycle.checkpoints.layers import find_stacks
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.table import find_host

_LEAST = 1e-5
"""Relative error that is always allowed: ten times what float32 leaves on models that do not magnify rounding."""
_NUDGE, _NUM_NUDGES, _FACTOR = 1e-6, 4, 3.0
"""Inputs are moved by about eight units in the last place, in four ways; limits are three times what that moves."""
_TEXT_LENGTHS = (11, 24)


@dataclass(frozen=True)
class Difference:
    """The difference of values from a reference's, at real positions.

    Values are [B, S, ...] or [B, ...].
    The largest and the mean difference, the largest relative to the reference's largest number, and the share of
    positions whose largest number is at the same place.
    """

    num_positions: int
    largest: float
    mean: float
    relative: float
    top1_agreement: float


@dataclass(frozen=True)
class PassCheck:
    """One comparison: its tier, where, the difference, and its limit.

    `limit` is the relative error that is allowed. `layer`: of a check on the graph's own input the layer, `OUTSIDE` for
    what follows the last one; else None.
    """

    tier: str
    where: str
    difference: Difference
    limit: float
    layer: int | None = None

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest number."""
        return self.difference.relative

    @property
    def is_right(self) -> bool:
        """Whether the limit is kept; NaN keeps none."""
        return self.error <= self.limit


@dataclass(frozen=True)
class PassParity:
    """Everything that was compared of a package of one pass."""

    weights: WeightsCheck
    files: FilesCheck
    checks: tuple[PassCheck, ...]

    @property
    def breaches(self) -> tuple[str, ...]:
        """Every broken limit, a line each, those that explain others first."""
        lines = [f"weights: {line}" for line in self.weights.wrong]
        lines += [f"files: {line}" for line in self.files.differences]
        lines += [
            f"{check.tier}: {check.where}: relative error {check.error:.1e} > {check.limit:.1e}"
            for check in self.checks
            if not check.is_right
        ]
        return tuple(lines)

    @property
    def passed(self) -> bool:
        """Whether no limit is broken."""
        return not self.breaches

    def describe(self) -> Iterator[str]:
        """The outcome for a terminal."""
        yield (
            f"weights: {self.weights.num_rows:,} rows and {self.weights.num_vectors:,} vectors, "
            f"{self.weights.num_wrong:,} not the twin's"
        )
        for tier in ("layer", "outputs", "rows"):
            own = [check for check in self.checks if check.tier == tier]
            if own:
                worst = max(own, key=lambda check: check.error / check.limit)
                yield (
                    f"{tier}: {len(own)} compared, the nearest to its limit {worst.where}: relative error "
                    f"{worst.error:.1e}, at most {worst.limit:.1e}"
                )
        yield "not judged: speed, the task's figure on held-out examples, other execution providers"


def is_single_pass(package: Path, twin: Path) -> bool:
    """Whether a package is a mixture of ours without a cache.

    Raises:
        ExportError, UpcycleError: no package or no checkpoint there, or a damaged one.
    """
    return is_own(read_config(twin).model_type) and not open_package(package).has_cache


def check_single_pass(package: Path, twin: Path, provider: str = CPU, seed: int = 0) -> PassParity:
    """Compare a package with its twin, on inputs drawn by a seed.

    Raises:
        ExportError, UpcycleError: a file cannot be read, the twin is no mixture of ours, or package and twin are not of
            one model.
    """
    opened = Twin(twin)
    config = opened.checkpoint.config
    host = find_host(config.model_type)
    name = (config.architectures or [""])[0]
    task = None if host is None else host.find_task(name.removeprefix(CLASS_PREFIX))
    if host is None or task is None or not is_own(config.model_type):
        raise ExportError(
            f"{twin}: is a {name or config.model_type}; a package without a cache is compared with a mixture of ours, "
            "as dense2moe.quantize writes its twin; give that"
        )
    rounds_activations = find_precision(package).rounds_activations
    model = load_model(twin, torch.float32, task)
    runtime = SinglePass(package, provider, Inspection(streams=True))
    rounding = RoundedInputs(model, opened) if rounds_activations and opened.scheme["tensors"] else nullcontext()
    sides = _Sides(model, runtime, rounding)
    checks: list[PassCheck] = []
    for case, given in _draw_cases(model, runtime, seed):
        checks += sides.compare(case, given)
    return PassParity(check_weights(read_constants(package), twin).check, check_files(package, twin), tuple(checks))


@dataclass(frozen=True)
class _Sides:
    """A package and its twin."""

    model: PreTrainedModel
    runtime: SinglePass
    rounding: AbstractContextManager[Any]

    def compare(self, case: str, given: Mapping[str, torch.Tensor]) -> Iterator[PassCheck]:
        """All checks of one input."""
        seen, mask = self.runtime.run(given), given.get(names.ATTENTION_MASK)
        nudged = [self._local(given, seen, number + 1) for number in range(_NUM_NUDGES)]
        local = self._local(given, seen, None)
        for place, value in local.items():
            tier = "layer" if names.is_hidden(place) else "outputs"
            limit = max(_LEAST, _FACTOR * max(_error(other[place], value, mask) for other in nudged))
            tap = names.order_tap(place)
            where = f"{place if tap is None else f'layer {tap[1]}'} on the graph's own input, {case}"
            yield PassCheck(tier, where, _differ(seen[place], value, mask), limit, OUTSIDE if tap is None else tap[1])
        whole, moved = self._whole(given, None), [self._whole(given, number + 1) for number in range(_NUM_NUDGES)]
        for name, value in whole.items():
            limit = max(_LEAST, _FACTOR * max(_error(other[name], value, mask) for other in moved))
            yield PassCheck("outputs", f"{name}, {case}", _differ(seen[name], value, mask), limit)
            yield from self._rows(case, name, given, seen[name], limit)

    def _rows(
        self, case: str, name: str, given: Mapping[str, torch.Tensor], batch: torch.Tensor, limit: float
    ) -> Iterator[PassCheck]:
        """Each row of a batch beside the same row alone."""
        mask = given.get(names.ATTENTION_MASK)
        for row in range(len(batch) if len(batch) > 1 else 0):
            alone = self.runtime.run({key: value[row : row + 1] for key, value in given.items()})[name]
            own = None if mask is None else mask[row : row + 1]
            yield PassCheck(
                "rows", f"{name} of row {row} alone, {case}", _differ(batch[row : row + 1], alone, own), limit
            )

    @torch.no_grad()
    def _whole(self, given: Mapping[str, torch.Tensor], nudge: int | None) -> dict[str, torch.Tensor]:
        """The twin's outputs, its first layer's input nudged by a seed."""
        with hear_layers(self.model, None, nudge, {}), self.rounding:
            output = self.model(**given)
        return {name: output[name] for name in self.runtime.outputs}

    @torch.no_grad()
    def _local(
        self, given: Mapping[str, torch.Tensor], seen: Mapping[str, torch.Tensor], nudge: int | None
    ) -> dict[str, torch.Tensor]:
        """What each layer of the twin gives on the graph's own values.

        And the outputs, on what the graph's last layer gave.
        """
        made: dict[str, torch.Tensor] = {}
        with hear_layers(self.model, seen, nudge, made), self.rounding:
            output = self.model(**given)
        return made | {name: output[name] for name in self.runtime.outputs}


@contextmanager
def hear_layers(
    model: PreTrainedModel,
    seen: Mapping[str, torch.Tensor] | None,
    nudge: int | None,
    made: dict[str, torch.Tensor],
) -> Iterator[None]:
    """Context manager: layers read the graph's values, nudged, and are heard.

    Without `seen` they read what the layer before gave.
    """
    generator = torch.Generator().manual_seed(nudge or 0)
    stacks = find_stacks(model)
    firsts = {sum(map(len, stacks[:number])) for number in range(len(stacks))}

    def move(value: torch.Tensor) -> torch.Tensor:
        if nudge is None:
            return value
        return value * (1 + _NUDGE * torch.randn(value.shape, generator=generator))

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        is_first = number in firsts
        own = args[0] if args else kwargs["hidden_states"]
        value = own if is_first or seen is None else seen[names.hidden(number - 1)].reshape(own.shape)
        if is_first or seen is not None:
            value = move(value)
        return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

    def after(number: int, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        made[names.hidden(number)] = value
        if seen is None:
            return None
        kept = seen[names.hidden(number)].reshape(value.shape)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    handles = []
    for number, layer in enumerate(itertools.chain(*stacks)):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, args, kwargs), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, __, output, number=number: after(number, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _error(found: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> float:
    """The largest difference over real positions, relative to the largest number."""
    return _differ(found, reference, mask).relative


def _differ(found: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> Difference:
    found = found.reshape(reference.shape)
    if mask is not None and reference.shape[:2] == mask.shape:
        found, reference = found[mask.bool()], reference[mask.bool()]
    error = (found - reference).abs()
    largest = float(reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    same = found.argmax(-1) == reference.argmax(-1)
    return Difference(
        same.numel(), float(error.max()), float(error.mean()), float(error.max()) / largest, float(same.float().mean())
    )


def _draw_cases(
    model: PreTrainedModel, runtime: SinglePass, seed: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Inputs: one row; three rows, of text padded to other lengths."""
    generator = torch.Generator().manual_seed(seed)
    interface = find_interface(model)
    for case, rows, length in (("one row", 1, _TEXT_LENGTHS[0]), ("three rows, padded", 3, _TEXT_LENGTHS[1])):
        length = min(length, interface.most_tokens)
        given = interface.make_inputs(rows, length)
        for name, value in given.items():
            if value.is_floating_point():
                given[name] = torch.randn(value.shape, generator=generator)
            elif name == names.INPUT_IDS:
                size = int(model.config.get_text_config().vocab_size)
                given[name] = torch.randint(min(5, size - 1), size, value.shape, generator=generator)
            elif name == "token_type_ids":
                given[name] = (torch.arange(length) >= length // 2).long().repeat(rows, 1)
            elif name == names.ATTENTION_MASK and rows > 1:
                value[1, length // 2 :] = 0
                value[2, 2:] = 0
        yield case, {name: given[name] for name in runtime.inputs}
