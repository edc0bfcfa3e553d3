"""Parity of encoders, and of models of images and sound.

They give everything in one pass, without a cache, whatever it is: logits of tokens, labels, hidden states, a pooler's
output, starts and ends of answers.

Beside each other run the package and its twin, the torch model with the package's own weights; where the package rounds
the inputs of its products to 8 bits, the twin rounds them the same (`RoundedInputs`). Tiers:

1. `weights` and `files`, as of every package.
2. `layer`: the twin's embeddings must be what the graph's first layer reads. Each layer of the twin reads what the
   *graph's* layer before gave, and must give what the graph's gives; what follows the last layer reads the graph's last
   one. So an error is seen where it is made.
3. `outputs`: what the graph gives in the end, with nothing replaced, of one row, of several, of padded ones, of text.
4. `rows`: each row of a batch alone, in the same graph.

An encoder and a decoder together are compared so too, as one pass (`pair`).

Limits are measured, not fixed: the twin reads its inputs once more, moved by a few units of their last places. Where
nothing flips over a rounding that is float32's noise, and where something does it is as large as what the graph may
differ by. A thousandth of a rounding step is no error, and a changed constant is. What may flip behind the last layer
may so in the end, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from transformers import PreTrainedModel

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import is_pair, open_package
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.pass_inputs import PassInputs, list_inputs
from dense2moe.export.parity.place import OUTSIDE
from dense2moe.export.parity.precision import find_precision
from dense2moe.export.parity.records import FilesCheck, WeightsCheck
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import check_weights
from dense2moe.export.quantization.parameters import find_embeddings
from dense2moe.export.quantization.simulation import RoundedInputs
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.upcycle.checkpoints.layers import find_blocks, find_stacks
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.table import find_host

_OWN = " on the graph's own input"
_LOOK_AT_THE_MASK = "rows without padding are right: look at the mask"
_LEAST = 1e-5
"""Relative error that is always allowed: ten times what float32 leaves on models that do not magnify rounding."""
_NUDGE, _NUM_NUDGES, _FACTOR = 1e-6, 4, 3.0
"""Inputs are moved by about eight units in the last place, in four ways; limits are three times what that moves."""
PassTier = Literal["layer", "outputs", "steps", "answers", "rows"]


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
    what is before the first or follows the last one; else None. `place`: what was compared, in words; `is_padded`:
    whether rows of its input are.
    """

    tier: PassTier
    where: str
    difference: Difference
    limit: float
    layer: int | None = None
    place: str = ""
    is_padded: bool = False

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
        wrong = [check for check in self.checks if not check.is_right]
        unpadded = {(check.tier, check.place) for check in wrong if not check.is_padded}
        for check in wrong:
            advice = "" if (check.tier, check.place) in unpadded else f" ({_LOOK_AT_THE_MASK})"
            lines.append(f"{check.tier}: {check.where}: relative error {check.error:.1e} > {check.limit:.1e}{advice}")
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
        if self.files.compared:
            yield f"files: {', '.join(self.files.compared)} compared, {len(self.files.differences)} differences"
        for tier in get_args(PassTier):
            own = [check for check in self.checks if check.tier == tier]
            if own:
                worst = max(own, key=lambda check: check.error / check.limit)
                yield (
                    f"{tier}: {len(own)} compared, the nearest to its limit {worst.where}: relative error "
                    f"{worst.error:.1e}, at most {worst.limit:.1e}"
                )
        yield "not judged: speed, what held-out examples score, other execution providers"


def is_single_pass(package: Path, twin: Path) -> bool:
    """Whether a package is a mixture of ours without a cache.

    Raises:
        ExportError, UpcycleError: no package or no checkpoint there, or a damaged one.
    """
    return is_own(read_config(twin).model_type) and not is_pair(package) and not open_package(package).has_cache


def check_single_pass(
    package: Path, twin: Path, provider: str = CPU, seed: int = 0, blocks: torch.Tensor | None = None
) -> PassParity:
    """Compare a package with its twin, on drawn inputs and on text.

    Args:
        package: a package without a cache.
        twin: the mixture of ours with the package's very weights.
        provider: where the package runs.
        seed: of what is drawn.
        blocks: ids of text [N, S], of a model that reads text.

    Raises:
        ExportError, UpcycleError: a file cannot be read, the twin is no mixture of ours, or package and twin are not of
            one model.
    """
    model, rounding = load_twin(package, twin)
    runtime = SinglePass(package, provider, Inspection(streams=True, values=_shown(package)))
    sides = PassSides(model, runtime, rounding)
    checks: list[PassCheck] = []
    for inputs in list_inputs(model, seed, blocks):
        checks += sides.compare(inputs)
    return PassParity(check_weights(read_constants(package), twin).check, check_files(package, twin), tuple(checks))


def load_twin(package: Path, twin: Path) -> tuple[PreTrainedModel, AbstractContextManager[Any]]:
    """A package's twin, and what makes it round alike.

    Raises:
        ExportError, UpcycleError: a file cannot be read, or the twin is no mixture of ours.
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
    rounds = find_precision(package).rounds_activations and opened.scheme["tensors"]
    model = load_model(twin, torch.float32, task)
    return model, RoundedInputs(model, opened) if rounds else nullcontext()


class OnePass(Protocol):
    """What gives outputs and taps by name, for inputs by name."""

    outputs: list[str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it reads."""

    def run(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All of them."""


@dataclass(frozen=True)
class PassSides:
    """A package and its twin."""

    model: PreTrainedModel
    runtime: OnePass
    rounding: AbstractContextManager[Any]

    def compare(self, inputs: PassInputs) -> Iterator[PassCheck]:
        """All checks of one input."""
        given = {name: inputs.given[name] for name in self.runtime.inputs}
        seen, mask = self.runtime.run(given), given.get(names.ATTENTION_MASK)
        nudged = [self._local(given, seen, number + 1) for number in range(_NUM_NUDGES)]
        known: dict[str, float] = {}
        for name, value in self._local(given, seen, None).items():
            limit = max(_LEAST, _FACTOR * max(_error(other[name], value, mask) for other in nudged))
            known[name] = limit
            tap = names.order_tap(name)
            is_output = tap is None and name != names.ENTERED
            place = "the embeddings" if name == names.ENTERED else f"{name if tap is None else f'layer {tap[1]}'}{_OWN}"
            yield PassCheck(
                "outputs" if is_output else "layer",
                f"{place}, {inputs.words}",
                differ(seen[name], value, mask),
                limit,
                OUTSIDE if tap is None else tap[1],
                place,
                inputs.is_padded,
            )
        whole, moved = self._whole(given, None), [self._whole(given, number + 1) for number in range(_NUM_NUDGES)]
        for name, value in whole.items():
            limit = max(known[name], _FACTOR * max(_error(other[name], value, mask) for other in moved))
            difference = differ(seen[name], value, mask)
            yield PassCheck("outputs", f"{name}, {inputs.words}", difference, limit, None, name, inputs.is_padded)
            yield from self._rows(inputs, name, given, seen[name], limit)

    def _rows(
        self, inputs: PassInputs, name: str, given: Mapping[str, torch.Tensor], batch: torch.Tensor, limit: float
    ) -> Iterator[PassCheck]:
        """Each row of a batch beside the same row alone."""
        mask = given.get(names.ATTENTION_MASK)
        for row in range(len(batch) if len(batch) > 1 else 0):
            alone = self.runtime.run({key: value[row : row + 1] for key, value in given.items()})[name]
            if alone.shape[1:] != batch.shape[1:]:  # each row beside all others, as images beside texts
                return
            own = None if mask is None else mask[row : row + 1]
            where, difference = f"{name} of row {row} alone, {inputs.words}", differ(batch[row : row + 1], alone, own)
            yield PassCheck("rows", where, difference, limit, None, name, inputs.is_padded)

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

        Before them its embeddings, and the outputs on what the graph's last layer gave.
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
    ends = list(itertools.accumulate(map(len, stacks)))
    firsts, lasts = {0, *ends[:-1]}, {end - 1 for end in ends}
    shows_embeddings = seen is not None and names.ENTERED in seen

    def move(value: torch.Tensor) -> torch.Tensor:
        if nudge is None:
            return value
        return value * (1 + _NUDGE * torch.randn(value.shape, generator=generator))

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        is_first = number in firsts
        own = args[0] if args else kwargs["hidden_states"]
        if number == 0 and shows_embeddings:
            made[names.ENTERED] = own
        shown = names.hidden(number - 1) if not is_first else names.ENTERED if number == 0 and shows_embeddings else ""
        value = own if seen is None or not shown else seen[shown].reshape(own.shape)
        if is_first or seen is not None:
            value = move(value)
        return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

    def after(number: int, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        made[names.hidden(number)] = value
        if seen is None:
            return None
        kept = seen[names.hidden(number)].reshape(value.shape)
        kept = move(kept) if number in lasts else kept  # what any other layer gives is moved where the next reads it
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    handles = []
    table = find_embeddings(model) if nudge is not None else None
    if table is not None:
        handles.append(
            table.register_forward_hook(lambda _, __, output: move(output) if torch.is_tensor(output) else output)
        )
    blocks = itertools.chain(*find_blocks(model))
    for number, (block, layer) in enumerate(zip(blocks, itertools.chain(*stacks), strict=True)):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, args, kwargs), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, __, output, number=number: after(number, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(package: Path) -> tuple[str, ...]:
    """What is shown beside layers: the name of their first input."""
    nodes = open_package(package).model.graph.node
    return (names.ENTERED,) if any(names.ENTERED in node.output for node in nodes) else ()


def _error(found: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> float:
    """The largest difference over real positions, relative to the largest number."""
    return differ(found, reference, mask).relative


def differ(found: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> Difference:
    """The difference of values from a reference's.

    At real positions, where a mask tells them.
    """
    found = found.reshape(reference.shape)
    if mask is not None and reference.shape[:2] == mask.shape:
        found, reference = found[mask.bool()], reference[mask.bool()]
    error = (found - reference).abs()
    largest = float(reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    same = found.argmax(-1) == reference.argmax(-1)
    return Difference(
        same.numel(), float(error.max()), float(error.mean()), float(error.max()) / largest, float(same.float().mean())
    )
