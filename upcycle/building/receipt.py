"""The receipt: measured proof that upcycling kept the function.

Both checkpoints are loaded by plain transformers, so nothing of ours stands between the files and the figures. "rel" is
max |MoE logits - dense logits| / max |dense logits| over real (not padded) positions. With copied experts and a zero
router, k = 2 weighs both experts with exactly one half, and the sum is bitwise the dense FFN wherever one half of its
output is a number of the dtype; every other router rounds, at most `ROUNDING_LIMIT` in float32.

Half of an odd multiple of the dtype's smallest number is no number of the dtype: it is rounded, and two of them are not
the whole. In float16 that number is 2^-24, and outputs below 1.2e-4, which every real model has, lose their last bit;
in bfloat16 and float32 it is below 1e-38. So where a comparison is not bitwise, the dense model is run again with each
FFN's output halved in the dtype and added to itself, and the mixture must equal that bit for bit. No tolerance is
needed, and one wrong bit anywhere is still seen.

Where the dense model itself gives a number that is not finite in a dtype, as models trained in bfloat16 may in float16,
nothing is compared in that dtype, and a note says so.

`ROUNDING_LIMIT` is of models that do not magnify rounding. Where it is broken, the dense model's own noise is measured,
float32 against float64 on the same text, and the limit becomes `_NOISE_FACTOR` times that if it is larger.

One thing of torch's stands between: transformers applies the activation to one half of a fused product, and on the CPU
torch computes the last elements of such a strided row of SiLU by another exp than those of a contiguous one. Where the
FFN's width is no multiple of the vector length (172 is not, 768 is), the two models differ in the last bit although
every weight is equal; with the GELU of erf ("gelu") they do at any width in float32. The receipt tries the activation
at the width; there it asks for rounding instead of bitwise equality.

Two models that do not fit into memory together are compared part by part: the embedding, each layer of both on what the
dense one's layer before gave, and the head (final norm, head, scale of the logits) on what its last layer gave. The
embedding and the head have no experts: they are equal bit for bit in every dtype, or within rounding where the dense
model's arithmetic was folded into their weights. Before that, transformers loads the names and shapes of both
checkpoints, without values, and must find none missing and none left over. Whether it ties a head that is stored is
left to transformers as well, which is given both matrices.

A layer's "rel" is of what it adds, so that a large residual stream does not hide its FFN: the difference of what the
layers give, divided by max |what the dense layer gives - what it reads|. Where an element of the stream is more than
twenty times that, a twentieth of the element divides: its own last bit is all that can be seen of the layer there.
Measured in float32 on every family, at 2 and 12 layers, k = 2 and 3: 3e-7 at most; where half of the stream is a
thousand times what a layer adds: 2e-6.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from dense2moe.upcycle.building.facts import Receipt, ReceiptLine
from dense2moe.upcycle.building.pieces import ExpertPart, Keep, Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.layerwise import apply_head, embed, load_layer, pad_left, run_layers
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules, router_weights
from dense2moe.upcycle.checkpoints.loading import check_whole
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint, read_chunks
from dense2moe.upcycle.checkpoints.tokenizer import encode, has_tokenizer, load_tokenizer
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.footprint import receipt_bytes
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.model_class import find_model_class

ROUNDING_LIMIT = 1e-5
"""Largest rel in float32 of a router that weighs experts unequally.

Measured 3e-7 to 1e-6 on 4 to 32 layers of every family, times ten.
"""

_NOISE_FACTOR = 3
"""Allowed rel in float32, as a multiple of what the dense model in float32 differs by from itself in float64.

Measured 0.1 to 1.0 on six families of
2 to 24 layers with weights of deviation 0.02 to 1, plain, granular and with half a shared expert, whole and by layer.
"""

_LEAST_WEIGHT = 1e-30  # no weight of a model that computes anything is smaller
_RESIDUAL_SHARE = 0.05  # two roundings of a sum in float32 are then 5e-6 of it: half of the limit

_MAX_TOKENS = 640
_MAX_WINDOW_TOKENS = 2048  # a text is made longer than _MAX_TOKENS only to cross a window, and no longer than this
_MAX_HALF_TOKENS = 96  # in half precision, which the CPU computes at a tenth of the speed
_DECODE_STEPS = 8
_LETTERS_PER_TOKEN = (
    64  # read for each token that is wanted: many times what tokens of English have, and a small part of the text
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXPERTS = ("eager", "grouped_mm")
_GROUPED_ROW_BYTES = 16  # torch's grouped_mm refuses rows that are no multiple of this
_MEMORY_SHARE = 0.7  # of what is free, for two models in float32 and what they compute
_MOST_BYTES = 3_000_000_000  # of memory, so that the receipt is never what a run needs most for


def write_receipt(source: Path, output: Path, plan: UpcyclePlan, block_size: int, progress: Progress) -> Receipt:
    """Compare the dense checkpoint with the mixture of experts made from it by `plan`.

    The limits are enforced where the plan keeps the function: with every router, or with a zero router alone.
    `block_size` is the length in tokens of a training block: one text is longer than that, and longer than an attention
    window.

    Raises:
        UpcycleError: a limit is broken, so the written checkpoint does not compute what the dense one does.
    """
    dense = open_checkpoint(source)
    mode, limit = choose_mode(plan, dense, block_size), rounding_limit(plan, dense)
    text = _read_text(source, block_size)
    notes = [*text.notes, *_compare_tokenizers(source, output)]
    if mode == "layers":
        notes.append("compared layer by layer: decoding with a cache and float16 were not run")
        # a layer, the embedding and the head each load a few tensors, and none would miss or find the others
        for directory in (
            source,
            output,
        ):
            check_whole(find_model_class(plan.conversion.family.task), directory)
    comparisons: list[ReceiptLine] = []
    for number, dtype in enumerate(_DTYPES):
        progress("comparing with the dense model", number, len(_DTYPES))
        experts = _implementations(plan, dtype, notes)
        read = text if dtype == "float32" else text.shorten(_MAX_HALF_TOKENS)
        if mode == "layers" and dtype == "float16":
            continue  # a layer's arithmetic shows in two dtypes, and every dtype is one more pass over the disk
        claim = _Claim(
            plan,
            dtype,
            plan.bitwise_at_zero and _can_be_bitwise(dense.config, dtype),
            limit if dtype == "float32" else None,
        )
        compare = _compare_models if mode == "whole" else _compare_layers
        try:
            found = list(compare(source, output, claim, read, experts))
        except _DenseNotFiniteError as error:
            if dtype == "float32":  # what every claim is about
                raise UpcycleError(
                    f"{source}: the dense model is not finite in float32 ({error}), so nothing can be compared; the "
                    "weights are broken; use others"
                ) from error
            notes.append(f"{dtype} was not compared: the dense model itself is not finite in it ({error})")
            continue
        for comparison in found:
            _check(comparison, output)
        comparisons += found
    progress("comparing with the dense model", len(_DTYPES), len(_DTYPES))
    return Receipt(mode, tuple(comparisons), (*notes, *_describe_rounding(comparisons)))


class _DenseNotFiniteError(ArithmeticError):
    """The dense model gives NaN or an infinity for a text or in a layer; the message names which."""


def _describe_rounding(comparisons: Sequence[ReceiptLine]) -> Iterator[str]:
    """What differs by the dtype or the model alone, and not by the conversion, in words."""
    for dtype in dict.fromkeys(c.dtype for c in comparisons if c.halves_bitwise):
        yield (
            f"zero router, {dtype}: bitwise but for FFN outputs whose half is no {dtype} number; bitwise with "
            "these halves rounded"
        )
    for dtype in dict.fromkeys(c.dtype for c in comparisons if not math.isfinite(c.rel)):
        yield (
            f"{dtype}: the mixture overflows where the dense model does not, since its experts' outputs are larger "
            "than their weighted sum"
        )
    raised = [c.limit for c in comparisons if c.limit is not None and c.limit > ROUNDING_LIMIT and c.noise is not None]
    if raised:
        yield (
            f"float32: this model magnifies rounding, so rel may be up to {max(raised):.1e}, {_NOISE_FACTOR} times "
            "what the dense model differs by "
            "from itself in float64"
        )


def choose_mode(plan: UpcyclePlan, dense: Checkpoint, block_size: int = 256) -> Literal["whole", "layers"]:
    """Whether both models are held at once, as the settings say or as memory allows.

    An encoder-decoder is always held whole.
    """
    if plan.settings.receipt != "auto" and plan.conversion.family.ffn_module is not None:
        return plan.settings.receipt
    needed = receipt_bytes(plan, dense, block_size)
    fits = needed <= min(_MOST_BYTES, _MEMORY_SHARE * psutil.virtual_memory().available)
    return "whole" if fits or plan.conversion.family.ffn_module is None else "layers"


def _implementations(plan: UpcyclePlan, dtype: str, notes: list[str]) -> tuple[str, ...]:
    """The experts implementations of transformers that can run these widths."""
    if plan.conversion.experts.top_1:
        return ("its own",)
    config = plan.target_config
    for name in ("hidden_size", plan.conversion.experts.width_field):
        row_bytes = getattr(config, name) * _DTYPES[dtype].itemsize
        if row_bytes % _GROUPED_ROW_BYTES:
            notes.append(
                f"grouped_mm in {dtype} was not run: it refuses rows of {row_bytes} bytes ({name} "
                f"{getattr(config, name)})"
            )
            return ("eager",)
    return _EXPERTS


@dataclass(frozen=True)
class _Text:
    """Three rows of token ids, padded on the left, their mask, and what they leave unshown; int64 [3, S]."""

    ids: torch.Tensor
    mask: torch.Tensor
    notes: tuple[str, ...]

    def shorten(self, length: int) -> _Text:
        """The last tokens of each row."""
        return _Text(self.ids[:, -length:], self.mask[:, -length:], self.notes)


@dataclass(frozen=True)
class _Claim:
    """What is claimed of a plan in a dtype.

    Bits equal with a zero router, and the largest rel, none where the dtype rounds too coarsely to judge.
    """

    plan: UpcyclePlan
    dtype: str
    bitwise_at_zero: bool
    limit: float | None


def _compare_models(
    source: Path, output: Path, claim: _Claim, text: _Text, experts: tuple[str, ...]
) -> Iterator[ReceiptLine]:
    plan, dtype = claim.plan, _DTYPES[claim.dtype]
    task = plan.conversion.family.task
    sparse = load_model(output, dtype, task)
    load = functools.cache(lambda wanted: load_model(source, wanted, task))
    texts = [("padded batch", text.ids, text.mask, False), ("decoding with a cache", text.ids, text.mask, True)]
    if claim.dtype == "float32":
        texts.insert(0, ("one long text", text.ids[:1], torch.ones_like(text.ids[:1]), False))
    for name, ids, mask, cached in texts:
        run = functools.partial(_real_logits, ids=ids, mask=mask, cached=cached)
        dense = _Dense(name, dtype, load, run, _ffn_names(plan))
        for implementation in experts:
            if len(experts) > 1:
                sparse.set_experts_implementation(implementation)
            for router in ("shipped", "zero"):
                with _router(sparse, router), _watch_groups(sparse, plan) as coverage:
                    found = run(sparse)
                yield _judge(found, dense, claim, router, implementation, ids.shape[1], coverage)


def _compare_layers(
    source: Path, output: Path, claim: _Claim, text: _Text, experts: tuple[str, ...]
) -> Iterator[ReceiptLine]:
    dense, sparse = open_checkpoint(source), open_checkpoint(output)
    plan, dtype = claim.plan, _DTYPES[claim.dtype]
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None
    real = text.mask.bool()
    pair = _Pair(*(embed(side, text.ids, dtype)[real].to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, "embedding", claim, text)
    states = torch.empty(0)
    for layer, before, _, after in run_layers(dense, text.ids, text.mask, dtype, ffn_module):
        model = load_layer(sparse, layer, dtype)
        run = functools.partial(_real_states, states=before, mask=text.mask)
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
                with _router(model, router), _watch_groups(model, plan) as coverage:
                    found = run(model)
                yield _judge(found, own, claim, router, implementation, text.ids.shape[1], coverage)
        states = after[real]
    pair = _Pair(*(apply_head(side, states, dtype).to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, "head", claim, text)


def _ffn_names(plan: UpcyclePlan) -> tuple[str, ...]:
    """Of a decoder, the modules below its base model that experts took the place of."""
    pattern = plan.conversion.family.ffn_module
    return () if pattern is None else tuple(pattern.format(layer=site.layer) for site in plan.sites)


@dataclass(frozen=True)
class _Pair:
    """What the mixture gives and what the dense model does, float32 [tokens, N], and what a layer of theirs read."""

    found: torch.Tensor
    reference: torch.Tensor
    read: torch.Tensor | None = None

    @property
    def bitwise(self) -> bool:
        """Whether they are equal."""
        return torch.equal(self.found, self.reference)

    @property
    def rel(self) -> float:
        """The largest difference, as the module's docstring says it.

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

    And what it gives under roundings that a right conversion may add; computed when asked for. `run` gives a model's
    outputs, float32 [tokens, N] of the real tokens; `ffns` are the modules below the base model that experts took the
    place of. `given` are the outputs where they are known already, and `read` is what a layer reads.
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
        """As the model gives them.

        Raises:
            _DenseNotFiniteError: one is NaN or infinite.
        """
        found = self.run(self.load(self.dtype)) if self.given is None else self.given
        if count := int((~torch.isfinite(found)).sum()):
            raise _DenseNotFiniteError(f"{self.text}: {count} of {found.numel()} numbers are NaN or infinite")
        return found

    @functools.cached_property
    def halved(self) -> torch.Tensor:
        """With the output y of each FFN replaced by y/2 + y/2 in the model's dtype.

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

    def compare(self, found: torch.Tensor) -> _Pair:
        """The mixture's outputs beside the model's own."""
        return _Pair(found, self.outputs, self.read)


def _judge(
    found: torch.Tensor, dense: _Dense, claim: _Claim, router: str, experts: str, num_tokens: int, coverage: list[float]
) -> ReceiptLine:
    plan, pair = claim.plan, dense.compare(found)
    bitwise_due = claim.bitwise_at_zero and router == "zero"
    kept = plan.keeps_function_at_zero if router == "zero" else plan.keeps_function
    limit, noise = claim.limit if kept else None, None
    if limit is not None and limit < pair.rel:
        noise = dense.noise
        limit = max(limit, _NOISE_FACTOR * noise)
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
    return plan.settings.num_experts_per_tok == 2


def _judge_outside(pair: _Pair, part: str, claim: _Claim, text: _Text) -> ReceiptLine:
    """Of what is outside the layers, which every conversion keeps."""
    if not torch.isfinite(pair.reference).all():
        raise _DenseNotFiniteError(f"{part}: not all of its numbers are finite")
    folded = any(
        isinstance(piece, Keep) and piece.fold is not None for write in claim.plan.writes for piece in write.pieces
    )
    limit = ROUNDING_LIMIT if claim.dtype == "float32" else None
    return ReceiptLine("no", claim.dtype, part, "no", text.ids.shape[1], pair.rel, pair.bitwise, not folded, limit)


def rounding_limit(plan: UpcyclePlan, dense: Checkpoint) -> float:
    """Largest rel in float32.

    Of sums in another order, and of weights that had to be rounded when they were multiplied. A scale that is a power
    of two rounds nothing but what it makes smaller than the dtype's normal numbers: half of a float16 weight below
    1.2e-4 may be no float16 number. What it takes from these matrices is measured.
    """
    scaled = {
        (piece.matrix, piece.scale, write.spec.dtype)
        for write in plan.writes
        for piece in write.pieces
        if isinstance(piece, ExpertPart) and piece.scale != 1.0
    }
    rounded = [torch.finfo(dtype).eps for _, scale, dtype in scaled if not _is_power_of_two(scale)]
    shrunk = [item for item in scaled if item[1] < 1 and torch.finfo(item[2]).tiny > _LEAST_WEIGHT]
    losses = [_measure_loss(dense, *item) for item in shrunk]
    return max([ROUNDING_LIMIT, *(10 * lost for lost in (*rounded, *losses))])


def _is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


def _measure_loss(dense: Checkpoint, matrix: Slice, scale: float, dtype: torch.dtype) -> float:
    """What a scaled matrix, stored in `dtype`, has lost: the norm of the difference over the norm."""
    lost = norm = 0.0
    for chunk in read_chunks(dense.entries[matrix.source], matrix.start, matrix.stop):
        exact = chunk.to(torch.float32) * scale
        lost += float((exact.to(dtype).to(torch.float32) - exact).square().sum(dtype=torch.float64))
        norm += float(exact.square().sum(dtype=torch.float64))
    return math.sqrt(lost / norm) if norm > 0 else 0.0


def _check(c: ReceiptLine, output: Path) -> None:
    where = f"{output}: {c.router} router, {c.dtype}, {c.experts} experts, {c.text}"
    if c.limit is not None and c.group_coverage is not None and c.group_coverage < 1:
        raise UpcycleError(
            f"{where}: {1 - c.group_coverage:.1%} of the tokens are sent to parts of different copies, as router "
            "logits tie; "
            "raise upcycle.router.logit_std or change the seed"
        )
    if c.bitwise_due and not (c.bitwise or c.halves_bitwise):
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; it must be bitwise equal")
    if c.limit is not None and not c.rel <= c.limit:
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; at most {c.limit:.0e}")


def _can_be_bitwise(config: Any, dtype: str) -> bool:
    """Whether torch's activation of a strided row is bitwise that of a contiguous one, at the FFN's width and dtype.

    On this machine. A million values, since rounding to bfloat16 hides nearly all differences: of GELU's, one value in
    twenty thousand shows.
    """
    width = config.intermediate_size
    fused = torch.randn(max(64, 1_000_000 // width), 2 * width, generator=torch.Generator().manual_seed(0)).to(
        _DTYPES[dtype]
    )
    gate = fused.chunk(2, dim=-1)[0]
    activation = ACT2FN[config.hidden_act]
    return torch.equal(activation(gate), activation(gate.contiguous()))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Float32 logits [B, S, vocabulary] of ids and mask [B, S]; `cached`.

    Of the last steps alone, decoded token by token after a prefill.
    An encoder-decoder reads the ids twice, as its input and as what it is to say.
    """
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:  # the encoder by itself: Switch refuses `use_cache` in a call that encodes too
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        given = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": ids}
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    if not cached:
        return cast(torch.Tensor, model(**given, use_cache=False).logits).to(torch.float32)
    prompt = ids.shape[1] - _DECODE_STEPS
    logits, past = [], None
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        step = given | {name: ids[:, start:stop]}
        if not model.config.is_encoder_decoder:
            step["attention_mask"] = mask[:, :stop]
        output = model(**step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[:, -1:])
    return torch.cat(logits[1:], dim=1).to(torch.float32)


def _real_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Float32 logits [tokens, vocabulary] of the real tokens of ids and mask [B, S]; see `_logits`."""
    logits = _logits(model, ids, mask, cached)
    return logits[mask[:, -logits.shape[1] :].bool()]


@torch.no_grad()
def _real_states(model: PreTrainedModel, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a model of one layer makes of states [B, S, H] with mask [B, S]: float32 [tokens, H] of the real tokens."""
    given = model(inputs_embeds=states.to(model.dtype), attention_mask=mask, use_cache=False).last_hidden_state
    return cast(torch.Tensor, given[mask.bool()].to(torch.float32))


@contextmanager
def _router(model: PreTrainedModel, router: str) -> Iterator[None]:
    """For the length of a `with`: the model with its routers as they are ("shipped") or all zero."""
    weights = [] if router == "shipped" else list(router_weights(model))
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    yield
    with torch.no_grad():
        for weight, old in zip(weights, saved, strict=True):
            weight.copy_(old)


@contextmanager
def _watch_groups(model: PreTrainedModel, plan: UpcyclePlan) -> Iterator[list[float]]:
    """For the length of a `with`.

    Collects, of each layer, the share of tokens that are sent to whole copies of the FFN. Empty unless granular.
    """
    size = plan.settings.group_size
    coverage: list[float] = []

    def watch(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        copies = (output[2] // size).sort(-1).values.view(len(output[2]), -1, size)
        coverage.append(float((copies == copies[..., :1]).all(-1).all(-1).float().mean()))

    handles = [router.register_forward_hook(watch) for router in router_modules(model)] if size > 1 else []
    yield coverage
    for handle in handles:
        handle.remove()


def _compare_tokenizers(source: Path, output: Path) -> Iterator[str]:
    """Whether the tokenizer gives the same ids in both directories.

    Transformers chooses its class, and so its rules, by the model beside it too.
    """
    if not has_tokenizer(source):
        return
    text = inspect.getsource(sys.modules[__name__])
    dense, sparse = (load_tokenizer(path) for path in (source, output))
    if encode(dense, text) != encode(sparse, text):
        yield (
            "transformers tokenizes otherwise beside the mixture than beside the dense model: by "
            f"{type(sparse).__name__} and by "
            f"{type(dense).__name__}; name the class that is meant in tokenizer_config.json, and see that "
            "tokenizer.json has its rules"
        )


def _read_text(source: Path, block_size: int) -> _Text:
    """Three rows of real English, one longer than a block and than a window, and two shorter, padded on the left.

    The text is this package's own documentation: at hand on every machine, and tokens that follow each other as in real
    text. A checkpoint without a tokenizer gets seeded random ids instead.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    context = getattr(config, "max_position_embeddings", _MAX_TOKENS)
    window = getattr(config, "sliding_window", None) or 0
    beyond = window + 4 * _DECODE_STEPS
    wanted = max(min(_MAX_TOKENS, block_size + block_size // 4), beyond if beyond <= _MAX_WINDOW_TOKENS else 0)
    length = max(2 * _DECODE_STEPS, min(wanted, context))
    notes: tuple[str, ...] = ()
    if length <= window < context:
        notes = (
            f"the text of {length} tokens does not cross the window of {window}; that it was kept is known from the "
            "config alone",
        )
    if has_tokenizer(source):
        text = (inspect.getsource(sys.modules[__name__]) * 4)[: _LETTERS_PER_TOKEN * length]
        stream = encode(load_tokenizer(source), text)
    else:
        stream = torch.randint(config.vocab_size, (4 * length,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, mask = pad_left(
        [stream[row : row + count] for row, count in enumerate((length, max(_DECODE_STEPS + 1, length // 2), 3))]
    )
    return _Text(ids, mask, notes)
