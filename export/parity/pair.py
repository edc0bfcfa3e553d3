"""Parity of an encoder and a decoder, a graph each.

As of a package that gives everything in one pass (`single_pass`): the encoder reads, the decoder is given drawn tokens
at once, and the layers of both are compared each on the graph's own input. Two tiers more:

1. `steps`: tokens that are fed one by one, with the cache, beside the same tokens fed at once.
2. `answers`: what the package writes greedily. The twin, which reads it, may prefer no other token by more than the
   limit of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dense2moe.export import names
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.pass_inputs import PassInputs, list_inputs
from dense2moe.export.parity.single_pass import (
    Difference,
    PassCheck,
    PassParity,
    PassSides,
    differ,
    load_twin,
)
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import check_weights
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.runtime.encoder_decoder import EncoderDecoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.upcycle.checkpoints.layers import find_stacks

_DECODER_IDS = "decoder_input_ids"
_NUM_TOKENS, _NUM_AT_ONCE, _NUM_WRITTEN = 9, 4, 8
"""Tokens that the decoder is given, of which the first at once; and tokens of an answer."""


def check_pair(
    package: Path, twin: Path, provider: str = CPU, seed: int = 0, blocks: torch.Tensor | None = None
) -> PassParity:
    """Compare a package with its twin, on drawn inputs and on text.

    Args:
        package: a package of an encoder and a decoder.
        twin: the mixture of ours with the package's very weights.
        provider: where the package runs.
        seed: of what is drawn.
        blocks: ids of text [N, S], of an encoder that reads text.

    Raises:
        ExportError, UpcycleError: a file cannot be read, the twin is no mixture of ours, or package and twin are not of
            one model.
    """
    model, rounding = load_twin(package, twin)
    runtime = EncoderDecoder(package, provider, Inspection(streams=True, values=(names.ENTERED,)))
    reader = _AsOnePass(runtime, len(find_stacks(model)[0]))
    sides = PassSides(model, reader, rounding)
    generator = torch.Generator().manual_seed(seed)
    checks: list[PassCheck] = []
    for inputs in list_inputs(model, seed, blocks):
        size = (len(next(iter(inputs.given.values()))), _NUM_TOKENS)
        ids = torch.randint(min(5, runtime.vocab_size - 1), runtime.vocab_size, size, generator=generator)
        given = replace(inputs, given={**inputs.given, _DECODER_IDS: ids})
        own = list(sides.compare(given))
        limit = next(check.limit for check in own if (check.tier, check.place) == ("outputs", names.LOGITS))
        checks += [*own, reader.compare_steps(given, limit), _compare_answers(sides, reader, inputs, limit)]
    return PassParity(check_weights(read_constants(package), twin).check, check_files(package, twin), tuple(checks))


class _AsOnePass:
    """Both graphs as one pass, their layers numbered through as the twin's."""

    def __init__(self, runtime: EncoderDecoder, num_encoder_layers: int) -> None:
        self.runtime, self._begin = runtime, num_encoder_layers
        self.outputs = [names.LOGITS]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the encoder reads, and the decoder's tokens."""
        return (*self.runtime.encoder.inputs, _DECODER_IDS)

    def run(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logits, and the streams of both graphs."""
        decoding = self.runtime.encode(given)
        found = self.runtime.run(decoding, given[_DECODER_IDS].numpy())
        decoded = {self._number(name): torch.from_numpy(value) for name, value in found.items()}
        return decoded | dict(decoding.shown)  # of both the same name has what enters the first layer

    def _number(self, name: str) -> str:
        place = names.order_tap(name)
        return name if place is None else f"{place[0]}.{place[1] + self._begin}"

    def compare_steps(self, inputs: PassInputs, limit: float) -> PassCheck:
        """Tokens one by one beside the same at once."""
        ids = inputs.given[_DECODER_IDS]
        at_once = self.run(inputs.given)[names.LOGITS]
        decoding = self.runtime.encode(inputs.given)
        pieces = [ids[:, :_NUM_AT_ONCE], *ids[:, _NUM_AT_ONCE:].split(1, 1)]
        found = np.concatenate([self.runtime.run(decoding, piece.numpy())[names.LOGITS] for piece in pieces], 1)
        difference = differ(torch.from_numpy(found), at_once, None)
        place = f"{names.LOGITS} of steps with the cache"
        return PassCheck("steps", f"{place}, {inputs.words}", difference, limit, None, place, inputs.is_padded)

    def write(self, read: Mapping[str, torch.Tensor], start: int) -> torch.Tensor:
        """Tokens written greedily after a first one [B, 1 + N]."""
        decoding = self.runtime.encode(read)
        ids = np.full((len(next(iter(read.values()))), 1), start, np.int64)
        written = [ids]
        for _ in range(_NUM_WRITTEN):
            ids = self.runtime.run(decoding, ids)[names.LOGITS][:, -1].argmax(-1)[:, None]
            written.append(ids)
        return torch.from_numpy(np.concatenate(written, 1))


@torch.no_grad()
def _compare_answers(sides: PassSides, reader: _AsOnePass, inputs: PassInputs, limit: float) -> PassCheck:
    """How much the twin would rather have written another token."""
    start = reader.runtime.generation.decoder_start
    ids = reader.write(inputs.given, 0 if start is None else start)
    read = {name: inputs.given[name] for name in reader.runtime.encoder.inputs}
    with sides.rounding:
        logits = sides.model(**read, **{_DECODER_IDS: ids[:, :-1]}).logits
    lost = logits.amax(-1, keepdim=True) - logits.gather(-1, ids[:, 1:, None])
    largest, same = float(lost.max()), float((logits.argmax(-1) == ids[:, 1:]).float().mean())
    difference = Difference(lost.numel(), largest, float(lost.mean()), largest / float(logits.abs().max()), same)
    place = "tokens written greedily"
    return PassCheck("answers", f"{place}, {inputs.words}", difference, limit, None, place, inputs.is_padded)
