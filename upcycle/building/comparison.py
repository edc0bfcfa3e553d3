"""Two models compared, whole or part by part, in the receipt's unit.

"rel" is max |MoE logits - dense logits| / max |dense logits| over real (not padded) positions.

A layer's "rel" is of what it adds, so that a large residual stream does not hide its FFN: the difference of what the
layers give, divided by max |what the dense layer gives - what it reads|. Each element's error is divided by the larger
of that and a twentieth of the element, so rounding of a large residual is not charged to the layer. Measured in float32
on every family, at 2 and 12 layers, k = 2 and 3: 3e-7 at most; where half of the stream is a thousand times what a
layer adds: 2e-6.

Half of an odd multiple of the dtype's smallest number is no number of the dtype: it is rounded, and two of them are not
the whole. In float16 that number is 2^-24, and outputs below 1.2e-4, which every real model has, lose their last bit;
in bfloat16 and float32 it is below 1e-38. So where a comparison is not bitwise, the dense model is run again with each
FFN's output halved in the dtype and added to itself, and the mixture must equal that bit for bit. No tolerance is
needed, and one wrong bit anywhere is still seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.facts import ReceiptLine
from dense2moe.upcycle.building.model_pass import real_states, set_router, watch_groups
from dense2moe.upcycle.building.pieces import Keep, Merged
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.receipt_cases import choose_cases
from dense2moe.upcycle.building.receipt_text import Text
from dense2moe.upcycle.building.rounding import NOISE_FACTOR, ROUNDING_LIMIT
from dense2moe.upcycle.checkpoints.layerwise import apply_final_norm, apply_head, embed, load_layer, run_layers
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import describe_error
from dense2moe.upcycle.gates.section import describe_gate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESIDUAL_SHARE = 0.05  # two roundings of a sum in float32 are then 5e-6 of it: half of the limit


class DenseNotFiniteError(ArithmeticError):
    """The dense model's outputs are not finite; the message names where.

    NaN or an infinity, for a text or in a layer.
    """


class DenseRefusedError(RuntimeError):
    """transformers does not run the dense model; the message is its own."""


@dataclass(frozen=True)
class Claim:
    """What is claimed of a plan in a dtype.

    Bits equal with a zero router, and the largest rel, none where the dtype rounds too coarsely to judge. `has_biases`:
    experts have; then transformers' grouped_mm rounds a product before it adds one, and eager and the dense model do
    not.
    """

    plan: UpcyclePlan
    dtype: str
    bitwise_at_zero: bool
    limit: float | None
    has_biases: bool = False


def compare_models(
    source: Path, output: Path, claim: Claim, text: Text | None, experts: tuple[str, ...]
) -> Iterator[ReceiptLine]:
    """Compare two whole models, both in memory, on every text.

    Or on whatever else they read; without `text` they read none.

    One comparison for each experts implementation and each router.

    Raises:
        DenseNotFiniteError: the dense model gives NaN or an infinity.
        DenseRefusedError: transformers does not run the dense model.
    """
    plan, dtype = claim.plan, DTYPES[claim.dtype]
    family, target = plan.conversion.family, plan.conversion.target
    sparse = load_model(output, dtype, target.task)
    load = functools.cache(lambda wanted: load_model(source, wanted, family.task))
    for case in choose_cases(sparse, plan.conversion, text, dtype):
        dense = _Dense(case.name, dtype, load, case.run, _ffn_names(plan))
        _ = dense.outputs  # what the dense model does not do is no fault of the mixture's
        for implementation in experts:
            if len(experts) > 1:
                sparse.set_experts_implementation(implementation)
            for router in ("shipped", "zero"):
                with set_router(sparse, router), watch_groups(sparse, plan.settings.group_size) as coverage:
                    found = case.run(sparse)
                yield _judge(found, dense, claim, router, implementation, case.num_tokens, coverage)


def compare_layers(
    source: Path, output: Path, claim: Claim, text: Text, experts: tuple[str, ...]
) -> Iterator[ReceiptLine]:
    """Compare embedding, layers and head, one part of each model at once.

    Of a head for labels, only the norm that it reads: its matrix is copied, and compared on the disk.

    Raises:
        DenseNotFiniteError: the dense model gives NaN or an infinity.
    """
    dense, sparse = open_checkpoint(source), open_checkpoint(output)
    plan, dtype = claim.plan, DTYPES[claim.dtype]
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None
    real = text.mask.bool()
    pair = OutputPair(*(embed(side, text.ids, dtype)[real].to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, "embedding", claim, text)
    states = torch.empty(0)
    for layer, before, _, after in run_layers(dense, text.ids, text.mask, dtype, ffn_module):
        model = load_layer(sparse, layer, dtype)
        run = functools.partial(real_states, states=before, mask=text.mask)
        is_sparse = next(router_modules(model), None) is not None
        own = _Dense(
            f"layer {layer}",
            dtype,
            functools.partial(load_layer, dense, layer),
            run,
            (ffn_module.format(layer=0),) if is_sparse else (),
            given=after[real].to(torch.float32),
            read=before[real].to(torch.float32),
        )
        for implementation in experts:
            if is_sparse:
                model.set_experts_implementation(implementation)
            for router in ("shipped", "zero"):
                with set_router(model, router), watch_groups(model, plan.settings.group_size) as coverage:
                    found = run(model)
                yield _judge(found, own, claim, router, implementation, text.ids.shape[1], coverage)
        states = after[real]
    finish, part = (apply_head, "head") if plan.conversion.family.find("head") else (apply_final_norm, "final norm")
    pair = OutputPair(*(finish(side, states, dtype).to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, part, claim, text)


def _ffn_names(plan: UpcyclePlan) -> tuple[str, ...]:
    """Names of the modules whose output was an FFN's that experts replace.

    They are relative to the base model.
    """
    patterns = plan.conversion.family.ffn_outputs
    return tuple(patterns[site.stack].format(layer=site.layer) for site in plan.sites) if patterns else ()


@dataclass(frozen=True)
class OutputPair:
    """Outputs of both models, float32 [tokens, N], and a layer's input."""

    found: torch.Tensor
    reference: torch.Tensor
    read: torch.Tensor | None = None

    @property
    def bitwise(self) -> bool:
        """Whether they are equal."""
        return torch.equal(self.found, self.reference)

    @property
    def rel(self) -> float:
        """The largest relative difference, as the module's docstring defines it.

        Of what is equal it is 0, whatever it is divided by.
        """
        difference = (self.found - self.reference).abs()
        least = torch.finfo(torch.float32).tiny  # a layer may add nothing, and logits may all be zero
        if self.read is None:
            return float(difference.max() / self.reference.abs().max().clamp(min=least))
        added = max(float((self.reference - self.read).abs().max()), least)
        return float((difference / (_RESIDUAL_SHARE * self.reference.abs()).clamp(min=added)).max())


@dataclass(frozen=True)
class _Dense:
    """The dense model, or a layer of it, on one text.

    It can be run with the roundings that a conversion may add. Each output is computed when asked for. `run` gives a
    model's outputs, float32 [tokens, N] of the real tokens; `ffns` are the modules below the base model that experts
    took the place of. `given` are the outputs where they are known already, and `read` is what a layer reads.
    """

    text: str
    dtype: torch.dtype
    load: Callable[[torch.dtype], PreTrainedModel]
    run: Callable[[PreTrainedModel], torch.Tensor]
    ffns: tuple[str, ...]
    given: torch.Tensor | None = None
    read: torch.Tensor | None = None

    @functools.cached_property
    def outputs(self) -> torch.Tensor:
        """The model's own outputs.

        Raises:
            DenseNotFiniteError: one is NaN or infinite.
            DenseRefusedError: transformers cannot compute them.
        """
        try:
            found = self.run(self.load(self.dtype)) if self.given is None else self.given
        except (RuntimeError, NotImplementedError) as error:
            raise DenseRefusedError(describe_error(error)) from error
        if count := int((~torch.isfinite(found)).sum()):
            raise DenseNotFiniteError(f"{self.text}: {count} of {found.numel()} numbers are NaN or infinite")
        return found

    @functools.cached_property
    def halved(self) -> torch.Tensor:
        """Outputs with each FFN's output y replaced by y/2 + y/2.

        Both are computed in the model's dtype.

        Y itself but where y/2 is rounded.
        """
        model = self.load(self.dtype)
        base = model.base_model
        handles = [
            base.get_submodule(name).register_forward_hook(lambda _, __, y: y * 0.5 + y * 0.5) for name in self.ffns
        ]
        try:
            return self.run(model)
        finally:
            for handle in handles:
                handle.remove()

    @functools.cached_property
    def noise(self) -> float:
        """The rel of the model to itself in float64.

        Norms and softmaxes stay in float32 there, as transformers computes them in every dtype.
        """
        return self.compare(self.run(self.load(torch.float64))).rel

    def compare(self, found: torch.Tensor) -> OutputPair:
        """The mixture's outputs beside the model's own."""
        return OutputPair(found, self.outputs, self.read)


def _judge(
    found: torch.Tensor, dense: _Dense, claim: Claim, router: str, experts: str, num_tokens: int, coverage: list[float]
) -> ReceiptLine:
    plan, pair = claim.plan, dense.compare(found)
    bitwise_due = claim.bitwise_at_zero and router == "zero" and not (claim.has_biases and experts == "grouped_mm")
    kept = plan.keeps_function_at_zero if router == "zero" else plan.keeps_function
    limit, noise = claim.limit if kept else None, None
    if limit is not None and limit < pair.rel:
        noise = dense.noise
        limit = max(limit, NOISE_FACTOR * noise)
    return ReceiptLine(
        router,
        claim.dtype,
        dense.text,
        experts,
        num_tokens,
        pair.rel,
        pair.bitwise,
        bitwise_due,
        limit,
        min(coverage) if coverage else None,
        halves_bitwise=bitwise_due and not pair.bitwise and _halves(plan) and torch.equal(found, dense.halved),
        noise=noise,
    )


def _halves(plan: UpcyclePlan) -> bool:
    """Whether a zero router weighs two experts by one half each."""
    return plan.settings.num_experts_per_tok == 2 and not describe_gate(plan.settings.make_gate())


def _judge_outside(pair: OutputPair, part: str, claim: Claim, text: Text) -> ReceiptLine:
    """The comparison outside the layers, which every conversion keeps.

    Not where it is merged of sources that differ.
    """
    if not torch.isfinite(pair.reference).all():
        raise DenseNotFiniteError(f"{part}: not all of its numbers are finite")
    pieces = [piece for write in claim.plan.writes for piece in write.pieces]
    folded = any(isinstance(piece, Keep | Merged) and piece.fold is not None for piece in pieces)
    merged = claim.plan.sources_differ and any(isinstance(piece, Merged) for piece in pieces)
    limit = ROUNDING_LIMIT if claim.dtype == "float32" and not merged else None
    due = not folded and not merged
    return ReceiptLine("no", claim.dtype, part, "no", text.ids.shape[1], pair.rel, pair.bitwise, due, limit)
