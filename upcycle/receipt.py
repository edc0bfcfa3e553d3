"""The receipt: measured proof that upcycling kept the function.

Both checkpoints are loaded by plain transformers, so nothing of ours stands between the files and the figures. "rel" is
max |MoE logits - dense logits| / max |dense logits| over real (not padded) positions. With copied experts and a zero router, k = 2 weighs both
experts with exactly one half, and the sum is bitwise the dense FFN; every other router rounds, at most `ROUNDING_LIMIT` in float32.

One thing of torch's stands between: transformers applies the activation to one half of a fused product, and on the CPU torch computes the last
elements of such a strided row of SiLU by another exp than those of a contiguous one. Where the FFN's width is no multiple of the vector length (172
is not, 768 is), the two models differ in the last bit although every weight is equal; with the GELU of erf ("gelu") they do at any width in float32.
The receipt tries the activation at the width; there it asks for rounding instead of bitwise equality.

Two models that do not fit into memory together are compared part by part: the embedding, each layer of both on what the dense one's layer before
gave, and the head (final norm, head, scale of the logits) on what its last layer gave. The embedding and the head have no experts: they are equal
bit for bit in every dtype, or within rounding where the dense model's arithmetic was folded into their weights.

A layer's "rel" is of what it adds, so that a large residual stream does not hide its FFN: the difference of what the layers give, divided by
max |what the dense layer gives - what it reads|. Where an element of the stream is more than twenty times that, a twentieth of the element divides:
its own last bit is all that can be seen of the layer there. Measured in float32 on every family, at 2 and 12 layers, k = 2 and 3: 3e-7 at most; where
half of the stream is a thousand times what a layer adds: 2e-6.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN

from upcycle.checkpoint import TOKENIZER_NAMES, Checkpoint, open_checkpoint
from upcycle.errors import UpcycleError
from upcycle.footprint import receipt_bytes
from upcycle.layerwise import apply_head, embed, load_layer, pad_left, run_layers
from upcycle.mapping import ExpertPart, Keep, UpcyclePlan
from upcycle.progress import Progress

ROUNDING_LIMIT = 1e-5
"""Largest rel in float32 of a router that weighs experts unequally: measured 3e-7 to 1e-6 on 4 to 32 layers of every family, times ten."""

_RESIDUAL_SHARE = 0.05  # two roundings of a sum in float32 are then 5e-6 of it: half of the limit

_MAX_TOKENS = 640
_MAX_WINDOW_TOKENS = 2048  # a text is made longer than _MAX_TOKENS only to cross a window, and no longer than this
_MAX_HALF_TOKENS = 96  # in half precision, which the CPU computes at a tenth of the speed
_DECODE_STEPS = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXPERTS = ("eager", "grouped_mm")
_GROUPED_ROW_BYTES = 16  # torch's grouped_mm refuses rows that are no multiple of this
_MEMORY_SHARE = 0.7  # of what is free, for two models in float32 and what they compute
_MOST_BYTES = 3_000_000_000  # of memory, so that the receipt is never what a run needs most for


@dataclass(frozen=True)
class Comparison:
    """One comparison of the two models: which router, dtype, text and experts implementation, and what came out.

    `text` names the part of the models where they are compared part by part; the embedding and the head have "no" router and "no" experts.
    `limit` is the largest rel that is allowed; none where the function need not be kept, or the dtype rounds too coarsely to judge. `bitwise_due`:
    every bit must be equal. `group_coverage`: of granular experts, the share of tokens that were sent to whole copies of the FFN.
    """

    router: str
    dtype: str
    text: str
    experts: str
    num_tokens: int
    rel: float
    bitwise: bool
    bitwise_due: bool
    limit: float | None
    group_coverage: float | None = None


@dataclass(frozen=True)
class Receipt:
    """All comparisons, whether of whole models or layer by layer, and what could not be compared, in words."""

    mode: Literal["whole", "layers"]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def write_receipt(source: Path, output: Path, plan: UpcyclePlan, block_size: int, progress: Progress) -> Receipt:
    """Compare the dense checkpoint with the mixture of experts made from it by `plan`.

    The limits are enforced where the plan keeps the function: with every router, or with a zero router alone. `block_size` is the length in tokens
    of a training block: one text is longer than that, and longer than an attention window.

    Raises:
        UpcycleError: a limit is broken, so the written checkpoint does not compute what the dense one does.
    """
    mode = choose_mode(plan, open_checkpoint(source), block_size)
    text = _read_text(source, block_size)
    notes = list(text.notes)
    if mode == "layers":
        notes.append("compared layer by layer: decoding with a cache and float16 were not run")
    comparisons: list[Comparison] = []
    for number, dtype in enumerate(_DTYPES):
        progress("comparing with the dense model", number, len(_DTYPES))
        experts = _implementations(plan, dtype, notes)
        read = text if dtype == "float32" else text.shorten(_MAX_HALF_TOKENS)
        if mode == "whole":
            comparisons += _compare_models(source, output, plan, read, dtype, experts)
        elif dtype != "float16":  # a layer's arithmetic shows in two dtypes, and every dtype is one more pass over the disk
            comparisons += _compare_layers(source, output, plan, read, dtype, experts)
    progress("comparing with the dense model", len(_DTYPES), len(_DTYPES))
    for comparison in comparisons:
        _check(comparison, output)
    return Receipt(mode, tuple(comparisons), tuple(notes))


def choose_mode(plan: UpcyclePlan, dense: Checkpoint, block_size: int = 256) -> Literal["whole", "layers"]:
    """Whether both models are held at once, as the settings say or as memory allows. An encoder-decoder is always held whole."""
    if plan.settings.receipt != "auto" and plan.conversion.family.ffn_module is not None:
        return plan.settings.receipt
    needed = receipt_bytes(plan, dense, block_size)
    fits = needed <= min(_MOST_BYTES, _MEMORY_SHARE * psutil.virtual_memory().available)
    return "whole" if fits or plan.conversion.family.ffn_module is None else "layers"


def _implementations(plan: UpcyclePlan, dtype: str, notes: list[str]) -> tuple[str, ...]:
    """The experts implementations of transformers that can run these widths."""
    if plan.conversion.target.top_1:
        return ("its own",)
    config = plan.target_config
    for name in ("hidden_size", plan.conversion.target.width_field):
        row_bytes = getattr(config, name) * _DTYPES[dtype].itemsize
        if row_bytes % _GROUPED_ROW_BYTES:
            notes.append(f"grouped_mm in {dtype} was not run: it refuses rows of {row_bytes} bytes ({name} {getattr(config, name)})")
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


def _compare_models(source: Path, output: Path, plan: UpcyclePlan, text: _Text, dtype: str, experts: tuple[str, ...]) -> Iterator[Comparison]:
    task = plan.conversion.family.task
    dense, sparse = (load_model(directory, _DTYPES[dtype], task) for directory in (source, output))
    bitwise_due = plan.bitwise_at_zero and _can_be_bitwise(dense.config, dtype)
    texts = [("padded batch", text.ids, text.mask, False), ("decoding with a cache", text.ids, text.mask, True)]
    if dtype == "float32":
        texts.insert(0, ("one long text", text.ids[:1], torch.ones_like(text.ids[:1]), False))
    for name, ids, mask, cached in texts:
        reference = _logits(dense, ids, mask, cached)
        real = _real(mask, reference)
        for implementation in experts:
            if len(experts) > 1:
                sparse.set_experts_implementation(implementation)
            for router in ("shipped", "zero"):
                with _router(sparse, router), _watch_groups(sparse, plan) as coverage:
                    found = _logits(sparse, ids, mask, cached)
                pair = _Pair(found[real], reference[real])
                yield _judge(pair, router, dtype, name, implementation, ids.shape[1], plan, bitwise_due, coverage)


def _compare_layers(source: Path, output: Path, plan: UpcyclePlan, text: _Text, dtype: str, experts: tuple[str, ...]) -> Iterator[Comparison]:
    dense, sparse = open_checkpoint(source), open_checkpoint(output)
    bitwise_due = plan.bitwise_at_zero and _can_be_bitwise(dense.config, dtype)
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None
    real = text.mask.bool()
    pair = _Pair(*(embed(side, text.ids, _DTYPES[dtype])[real].to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, "embedding", dtype, text, plan)
    states = torch.empty(0)
    for layer, before, _, after in run_layers(dense, text.ids, text.mask, _DTYPES[dtype], ffn_module):
        model = load_layer(sparse, layer, _DTYPES[dtype])
        for implementation in experts:
            if next(router_modules(model), None) is not None:
                model.set_experts_implementation(implementation)
            for router in ("shipped", "zero"):
                with _router(model, router), _watch_groups(model, plan) as coverage, torch.no_grad():
                    found = model(inputs_embeds=before, attention_mask=text.mask, use_cache=False).last_hidden_state
                pair = _Pair(*(given[real].to(torch.float32) for given in (found, after, before)))
                yield _judge(pair, router, dtype, f"layer {layer}", implementation, text.ids.shape[1], plan, bitwise_due, coverage)
        states = after[real]
    pair = _Pair(*(apply_head(side, states, _DTYPES[dtype]).to(torch.float32) for side in (sparse, dense)))
    yield _judge_outside(pair, "head", dtype, text, plan)


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
        """The largest difference, as the module's docstring says it."""
        difference = (self.found - self.reference).abs()
        if self.read is None:
            return float(difference.max() / self.reference.abs().max())
        added = float((self.reference - self.read).abs().max())
        least = max(added, torch.finfo(torch.float32).tiny)  # a layer may add nothing
        return float((difference / (_RESIDUAL_SHARE * self.reference.abs()).clamp(min=least)).max())


def _judge(
    pair: _Pair, router: str, dtype: str, text: str, experts: str, num_tokens: int, plan: UpcyclePlan, bitwise_due: bool, coverage: list[float]
) -> Comparison:
    kept = plan.keeps_function_at_zero if router == "zero" else plan.keeps_function
    return Comparison(
        router, dtype, text, experts, num_tokens, pair.rel, pair.bitwise, bitwise_due and router == "zero",
        rounding_limit(plan) if kept and dtype == "float32" else None, min(coverage) if coverage else None,
    )  # fmt: skip


def _judge_outside(pair: _Pair, part: str, dtype: str, text: _Text, plan: UpcyclePlan) -> Comparison:
    """Of what is outside the layers, which every conversion keeps."""
    folded = any(isinstance(piece, Keep) and piece.fold is not None for write in plan.writes for piece in write.pieces)
    limit = ROUNDING_LIMIT if dtype == "float32" else None
    return Comparison("no", dtype, part, "no", text.ids.shape[1], pair.rel, pair.bitwise, not folded, limit)


def rounding_limit(plan: UpcyclePlan) -> float:
    """Largest rel in float32: of sums in another order, and of weights that had to be rounded when they were multiplied."""
    scales = {
        (piece.scale, write.spec.dtype) for write in plan.writes for piece in write.pieces if isinstance(piece, ExpertPart) and piece.scale != 1.0
    }
    rounded = [torch.finfo(dtype).eps for scale, dtype in scales if not float.hex(scale).lstrip("-").startswith("0x1.0000000000000p")]
    return max([ROUNDING_LIMIT, *(10 * eps for eps in rounded)])


def _check(c: Comparison, output: Path) -> None:
    where = f"{output}: {c.router} router, {c.dtype}, {c.experts} experts, {c.text}"
    if c.limit is not None and c.group_coverage is not None and c.group_coverage < 1:
        raise UpcycleError(
            f"{where}: {1 - c.group_coverage:.1%} of the tokens are sent to parts of different copies, as router logits tie; "
            "raise upcycle.router.logit_std or change the seed"
        )
    if c.bitwise_due and not c.bitwise:
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; it must be bitwise equal")
    if c.limit is not None and not c.rel <= c.limit:
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; at most {c.limit:.0e}")


def load_model(directory: Path, dtype: torch.dtype, task: str = "text-generation") -> PreTrainedModel:
    """Load a model by transformers alone and refuse what it would only warn about; `task` names the head as Hugging Face names tasks.

    Raises:
        UpcycleError: weights are missing, left over or of another shape.
    """
    gc.collect()  # models of transformers hold themselves; one that nobody names any more would lie beside the new one
    auto_class = TasksManager.get_model_class_for_task(task, framework="pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)  # a shared expert of width 0
        model, info = auto_class.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # only so that they are listed, and refused below, instead of a RuntimeError without their names
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            raise UpcycleError(f"{directory}: loading by transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
    if next(router_weights(model), None) is not None and not model.config.is_encoder_decoder:
        # The default, grouped_mm, refuses bfloat16 experts whose rows are no multiple of 16 bytes; eager takes every width.
        model.set_experts_implementation("eager")
    return cast(PreTrainedModel, model.eval())


def _can_be_bitwise(config: Any, dtype: str) -> bool:
    """Whether torch's activation of a strided row is bitwise that of a contiguous one, at the FFN's width and dtype, on this machine.

    A million values, since rounding to bfloat16 hides nearly all differences: of GELU's, one value in twenty thousand shows.
    """
    width = config.intermediate_size
    fused = torch.randn(max(64, 1_000_000 // width), 2 * width, generator=torch.Generator().manual_seed(0)).to(_DTYPES[dtype])
    gate = fused.chunk(2, dim=-1)[0]
    activation = ACT2FN[config.hidden_act]
    return torch.equal(activation(gate), activation(gate.contiguous()))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Float32 logits [B, S, vocabulary] of ids and mask [B, S]; `cached`: of the last steps alone, decoded token by token after a prefill.

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


def _real(mask: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Which positions of logits [B, S, vocabulary], the last S of the mask, are of real tokens; bool [B, S]."""
    return mask[:, -logits.shape[1] :].bool()


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
    """For the length of a `with`: collects, of each layer, the share of tokens that are sent to whole copies of the FFN. Empty unless granular."""
    size = plan.settings.group_size
    coverage: list[float] = []

    def watch(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        copies = (output[2] // size).sort(-1).values.view(len(output[2]), -1, size)
        coverage.append(float((copies == copies[..., :1]).all(-1).all(-1).float().mean()))

    handles = [router.register_forward_hook(watch) for router in router_modules(model)] if size > 1 else []
    yield coverage
    for handle in handles:
        handle.remove()


def router_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The router of each layer, in order: the module `gate` or `router` beside experts."""
    for module in model.modules():
        if hasattr(module, "experts") and (router := getattr(module, "gate", None) or getattr(module, "router", None)) is not None:
            yield cast(torch.nn.Module, router)


def sparse_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The numbers of a decoder's layers that have experts."""
    layers = cast(torch.nn.ModuleList, model.get_decoder().layers)
    return tuple(number for number, layer in enumerate(layers) if next(router_modules(layer), None) is not None)


def router_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The router weight [num_experts, hidden] of each layer, in order."""
    for router in router_modules(model):
        yield cast(torch.nn.Parameter, getattr(router, "classifier", router).weight)


def selection_biases(model: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    """The selection bias, float32 [num_experts], of each layer's router, in order; None of a router without one."""
    for router in router_modules(model):
        yield getattr(router, "e_score_correction_bias", None)


def _read_text(source: Path, block_size: int) -> _Text:
    """Three rows of real English, one longer than a block and than a window, and two shorter, padded on the left.

    The text is this package's own documentation: at hand on every machine, and tokens that follow each other as in real text. A checkpoint
    without a tokenizer gets seeded random ids instead.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    context = getattr(config, "max_position_embeddings", _MAX_TOKENS)
    window = getattr(config, "sliding_window", None) or 0
    beyond = window + 4 * _DECODE_STEPS
    wanted = max(min(_MAX_TOKENS, block_size + block_size // 4), beyond if beyond <= _MAX_WINDOW_TOKENS else 0)
    length = max(2 * _DECODE_STEPS, min(wanted, context))
    notes: tuple[str, ...] = ()
    if length <= window < context:
        notes = (f"the text of {length} tokens does not cross the window of {window}; that it was kept is known from the config alone",)
    if any((source / name).is_file() for name in TOKENIZER_NAMES):
        text = inspect.getsource(sys.modules[__name__])
        stream = AutoTokenizer.from_pretrained(source, local_files_only=True)(text * 4, verbose=False)["input_ids"]
    else:
        stream = torch.randint(config.vocab_size, (4 * length,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, mask = pad_left([stream[row : row + count] for row, count in enumerate((length, max(_DECODE_STEPS + 1, length // 2), 3))])
    return _Text(ids, mask, notes)
