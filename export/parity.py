"""Parity: does the package compute what the torch model computes?

Two questions, two numbers. Against the *twin*, the torch model with the very weights of the package: is the export right? Against the
fine-tuned model: did quantizing cost too much? Both references are unpatched transformers in float32 with eager experts, one full forward without
a cache, so that chained decoding is checked against something that has no cache at all. A longrope that switches its factors on the way is the
exception: there only a reference that is fed in the same pieces computes the same function. And where activations are rounded with scales that are
part of the file, the twin rounds them too (`export.simulation`); else the first question would be the second.

A router can tie to the last bit, and then two right computations may choose different experts. Such a flip (the reference's margin below
`_TIE_MARGIN`) is counted and reported apart; the tokens from there on in that row are left out of the largest error, and nothing else is. Where
the tie is exact (`_EXACT_TIE`) logits cannot tell which experts an operator took; there the residual stream after the layer tells (`_MOVED`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from export.config import ParityConfig, Variant
from export.family import rotary_switch
from export.progress import Progress
from export.runtime import CPU, CUDA, HIDDEN, ROUTER_LOGITS, Decoder, is_at_hand
from export.simulation import RoundedInputs
from export.speed import measure_speed
from export.twin import SCHEME_NAME, Twin

_TIE_MARGIN = 1e-4  # router logits; float32 noise in them is 1e-6, so a flip above this margin is a fault and not a tie
_EXACT_TIE = 1e-6  # router logits; below it the softmax may round two of them to one score, and then every operator has an order of its own
_MOVED = 1e-4  # relative length of a difference of residual streams; float32 noise in them is 1e-6, another expert changes them by 1e-2 and more
_BATCH = 4
_TIMED_TOKENS = 32


@dataclass(frozen=True)
class Check:
    """Logits of one way of feeding the package, against one full forward of the twin."""

    name: str
    num_tokens: int
    max_error: float
    mean_error: float
    relative_error: float
    top1_agreement: float
    num_tie_flips: int


@dataclass(frozen=True)
class Agreement:
    """The package against one torch model on held-out text.

    By layer: agreement of the sets of top-k experts, 1 in a layer without experts, and the relative error of the residual stream.
    """

    max_error: float
    mean_error: float
    kl: float
    top1_agreement: float
    routing_agreement: tuple[float, ...]
    hidden_error: tuple[float, ...]


@dataclass(frozen=True)
class ProviderParity:
    """All figures of one execution provider; losses and perplexities over the same held-out tokens, speeds at batch 1."""

    onnxruntime: str
    checks: tuple[Check, ...]
    twin: Agreement
    finetuned: Agreement
    perplexity: float
    twin_perplexity: float
    finetuned_perplexity: float
    worst_layer: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Parity:
    """The outcome: figures by provider (or why it was not run), and every broken threshold in words."""

    providers: dict[str, ProviderParity | str]
    breaches: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no threshold was broken."""
        return not self.breaches


@dataclass(frozen=True)
class _Forward:
    """What one computation of ids [B, S] gave: logits [B, S, V], by layer router logits [B, S, E] and residual stream [B, S, H]; and k.

    A layer without experts has None for router logits.
    """

    logits: torch.Tensor
    routers: tuple[torch.Tensor | None, ...]
    hiddens: tuple[torch.Tensor, ...]
    top_k: int


Reference = Callable[[torch.Tensor, torch.Tensor, int], _Forward]
"""Ids and mask [B, S], and how many of the S tokens the package reads at once, before one at a time."""


def check_parity(
    package: Path, twin: Path, finetuned: Path, blocks: torch.Tensor, variant: Variant, rounds_activations: bool, config: ParityConfig,
    progress: Progress,
) -> Parity:  # fmt: skip
    """Compare a package with its twin and with the fine-tuned model on held-out blocks [N, block_size], on every provider at hand.

    `rounds_activations`: the graph computes in 16 bits or with 8-bit activations, so its logits are held to `max_kl` and not to
    `max_relative_error`. A package that no provider here can run is a breach.
    """
    if config.num_blocks is not None:
        count = min(config.num_blocks, len(blocks))
        blocks = blocks[torch.arange(count) * len(blocks) // count]
    providers: dict[str, ProviderParity | str] = {}
    breaches: list[str] = []
    computes_in = Twin(twin).element_type
    for provider in (CPU, CUDA):
        if provider == CPU and computes_in == "bfloat16":
            providers[provider] = "not run: onnxruntime's CPU does not compute in bfloat16"
            continue
        if provider == CUDA and not is_at_hand(provider):
            providers[provider] = "not run: no CUDA device"
            continue
        result = _measure(package, twin, finetuned, blocks, config, provider, progress)
        providers[provider] = result
        breaches += [f"{provider}: {breach}" for breach in find_breaches(result, variant, rounds_activations, config)]
    if all(isinstance(found, str) for found in providers.values()):
        breaches.append(f"compared nowhere: {'; '.join(f'{provider}: {found}' for provider, found in providers.items())}")
    return Parity(providers, tuple(breaches))


def find_breaches(result: ProviderParity, variant: Variant, rounds_activations: bool, config: ParityConfig) -> list[str]:
    """Every threshold that the figures break, each in one line that names the worst layer."""
    worst = f"worst layer {result.worst_layer}: routing agreement {result.twin.routing_agreement[result.worst_layer]:.4f}, "
    worst += f"hidden error {result.twin.hidden_error[result.worst_layer]:.1e}"
    breaches = []
    for check in result.checks:
        if not rounds_activations and not check.relative_error <= config.max_relative_error:
            breaches.append(f"{check.name}: relative error {check.relative_error:.1e} > {config.max_relative_error:.0e} ({worst})")
    if not result.twin.kl <= config.max_kl:
        breaches.append(f"KL from the twin {result.twin.kl:.1e} > {config.max_kl:.0e} ({worst})")
    if not min(result.twin.routing_agreement) >= config.min_routing_agreement:
        breaches.append(f"routing agreement with the twin {min(result.twin.routing_agreement):.4f} < {config.min_routing_agreement} ({worst})")
    increase = result.perplexity / result.finetuned_perplexity - 1
    limit = config.max_perplexity_increase.get(variant, math.inf)
    if not increase <= limit:
        breaches.append(f"perplexity {result.perplexity:.4f} is {increase:+.2%} of the fine-tuned model's; at most {limit:+.2%} ({worst})")
    return breaches


def _measure(
    package: Path, twin: Path, finetuned: Path, blocks: torch.Tensor, config: ParityConfig, provider: str, progress: Progress
) -> ProviderParity:
    decoder = Decoder(package, provider, taps=True)
    num_parts = 3
    progress("checking logits", 0, num_parts)
    with _reference(twin) as reference:
        checks = _check_logits(decoder, reference, blocks, config)
        progress("comparing with the twin", 1, num_parts)
        against_twin, onnx_loss, twin_loss = _compare(decoder, reference, blocks)
    progress("comparing with the fine-tuned model", 2, num_parts)
    with _reference(finetuned) as reference:
        against_finetuned, _, finetuned_loss = _compare(decoder, reference, blocks)
    speed = measure_speed(Decoder(package, provider), blocks[0].tolist(), _TIMED_TOKENS)
    progress("comparing with the fine-tuned model", num_parts, num_parts)
    layers = range(len(against_twin.routing_agreement))
    worst = min(layers, key=lambda n: (against_twin.routing_agreement[n], -against_twin.hidden_error[n]))
    return ProviderParity(
        ort.__version__, tuple(checks), against_twin, against_finetuned, _perplexity(onnx_loss), _perplexity(twin_loss),
        _perplexity(finetuned_loss), worst, speed.prefill, speed.decode,
    )  # fmt: skip


def _perplexity(loss: float) -> float:
    """exp(loss), infinite beyond float64: a broken package is a breach and no crash."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


@contextmanager
def _reference(directory: Path) -> Any:
    """The torch model as a function, with router logits and residual streams caught by hooks on whole layers.

    Where the graph rounds activations with scales that the directory has, so does the model.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager", local_files_only=True)
    model.eval()
    has_scales = (directory / SCHEME_NAME).is_file() and bool(Twin(directory).scheme["input_scales"])
    rounding = RoundedInputs(model, Twin(directory)) if has_scales else nullcontext()
    layers = model.get_decoder().layers
    hiddens: dict[int, torch.Tensor] = {}
    routers: dict[int, torch.Tensor] = {}

    def catch(caught: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: caught.update({layer: output[0] if isinstance(output, tuple) else output})

    for n, layer in enumerate(layers):
        layer.register_forward_hook(catch(hiddens, n))
        for module in layer.modules():
            if hasattr(module, "experts"):
                router = getattr(module, "gate", None) or module.router
                cast(torch.nn.Module, router).register_forward_hook(catch(routers, n))

    @torch.inference_mode()
    def read(ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None) -> _Forward:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with rounding:
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None).logits
        by_layer = tuple(routers[n].reshape(*ids.shape, -1) if n in routers else None for n in range(len(layers)))
        return _Forward(logits, by_layer, tuple(hiddens[n] for n in range(len(layers))), model.config.num_experts_per_tok)

    def forward(ids: torch.Tensor, mask: torch.Tensor, num_prefill: int) -> _Forward:
        size, switch = ids.shape[1], rotary_switch(model.config)
        if switch is None or size <= switch:
            return read(ids, mask, None)
        cache, ends = DynamicCache(), [num_prefill, *range(num_prefill + 1, size + 1)]
        pieces = zip([0, *ends], ends, strict=False)
        return _join([read(ids[:, start:end], mask[:, :end], cache) for start, end in pieces])

    yield forward


def _join(parts: Sequence[_Forward]) -> _Forward:
    """Parts that follow each other in length."""
    routers = [
        torch.cat(found, 1) if (found := [r for r in layer if r is not None]) else None
        for layer in zip(*(part.routers for part in parts), strict=True)
    ]
    hiddens = [torch.cat(layer, 1) for layer in zip(*(part.hiddens for part in parts), strict=True)]
    return _Forward(torch.cat([part.logits for part in parts], 1), tuple(routers), tuple(hiddens), parts[0].top_k)


def _run(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor, num_prefill: int) -> _Forward:
    """The package over ids [B, S]: a prefill of `num_prefill` tokens, then one token at a time."""
    cache = decoder.new_cache(len(ids), ids.shape[1])
    parts = [decoder.run(cache, ids[:, :num_prefill].numpy(), mask[:, :num_prefill].numpy())]
    parts += [decoder.run(cache, ids[:, n : n + 1].numpy()) for n in range(num_prefill, ids.shape[1])]

    def joined(name: str) -> torch.Tensor:
        pieces = [part[name].reshape(len(ids), -1, part[name].shape[-1]) for part in parts]
        return torch.from_numpy(np.concatenate(pieces, axis=1))

    layers = range(sum(name.startswith(HIDDEN) for name in decoder.taps))
    routers = tuple(joined(name) if (name := f"{ROUTER_LOGITS}{n}") in decoder.taps else None for n in layers)
    return _Forward(joined("logits"), routers, tuple(joined(f"{HIDDEN}{n}") for n in layers), decoder.config["num_experts_per_tok"])


def _check_logits(decoder: Decoder, reference: Reference, blocks: torch.Tensor, config: ParityConfig) -> list[Check]:
    size = min(blocks.shape[1], decoder.context_length)
    short, steps = max(2, size // 7), min(config.decode_steps, size - 1)
    start = size - steps
    batch = blocks[: min(3, len(blocks)), :size]
    ones = torch.ones_like(batch)
    padded = ones.clone()
    for row in range(1, len(batch)):
        padded[row, : start * row // len(batch)] = 0
    cases = [
        ("prefill, batch 1, 1 token", batch[:1, :1], ones[:1, :1], 1),
        (f"prefill, batch 1, {short} tokens", batch[:1, :short], ones[:1, :short], short),
        (f"prefill, batch 1, {size} tokens", batch[:1], ones[:1], size),
        (f"prefill, batch {len(batch)}, {size} tokens, left padding", batch, padded, size),
        (f"{steps} decode steps after {start} tokens, batch 1", batch[:1], ones[:1], start),
        (f"{steps} decode steps after {start} tokens, batch {len(batch)}, left padding", batch, padded, start),
    ]
    return [_check(name, _run(decoder, ids, mask, prefill), reference(ids, mask, prefill), mask) for name, ids, mask, prefill in cases]


def _check(name: str, found: _Forward, expected: _Forward, mask: torch.Tensor) -> Check:
    real = mask.bool()
    flips = torch.zeros_like(real)
    for ours, theirs, stream, true_stream in zip(found.routers, expected.routers, found.hiddens, expected.hiddens, strict=True):
        if ours is None or theirs is None:
            continue
        margin, own_margin = (_margin(routers, expected.top_k) for routers in (theirs, ours))
        tied = torch.minimum(margin, own_margin) < _EXACT_TIE
        moved = (stream - true_stream).norm(dim=-1) > _MOVED * true_stream.norm(dim=-1)
        flips |= (~same_experts(ours, theirs, expected.top_k) | (tied & moved)) & (margin < _TIE_MARGIN) & real
    judged = real & (flips.cumsum(1) == 0)
    error = (found.logits - expected.logits).abs().amax(-1)
    top1 = found.logits.argmax(-1) == expected.logits.argmax(-1)
    largest = float(error[judged].max()) if judged.any() else 0.0
    scale = float(expected.logits[real].abs().max())
    mean = float((found.logits - expected.logits)[real].abs().mean())
    return Check(name, int(real.sum()), largest, mean, largest / scale, float(top1[real].float().mean()), int(flips.sum()))


def same_experts(ours: torch.Tensor, theirs: torch.Tensor, top_k: int) -> torch.Tensor:
    """Whether two router logits [..., E] choose the same set of top-k experts; bool [...]."""
    a = ours.topk(top_k, dim=-1).indices.sort(-1).values
    b = theirs.topk(top_k, dim=-1).indices.sort(-1).values
    return (a == b).all(-1)


def _margin(routers: torch.Tensor, top_k: int) -> torch.Tensor:
    """Router logit of the last chosen expert minus that of the first one left out; infinite where all are chosen."""
    if top_k == routers.shape[-1]:
        return torch.full(routers.shape[:-1], math.inf)
    top = routers.topk(top_k + 1, dim=-1).values
    return top[..., -2] - top[..., -1]


@dataclass
class _Sums:
    """Running sums of a comparison, so that no more than one batch of logits is held."""

    tokens: int = 0
    predictions: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0
    kl: float = 0.0
    top1: float = 0.0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    same_routing: list[float] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=list)

    def add(self, found: _Forward, expected: _Forward, ids: torch.Tensor) -> None:
        count = ids.numel()
        error = (found.logits - expected.logits).abs()
        self.tokens += count
        self.max_error = float(error.max().clamp(min=self.max_error))  # NaN stays NaN
        self.mean_error += float(error.mean()) * count
        log_p, log_q = expected.logits.log_softmax(-1), found.logits.log_softmax(-1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.top1 += float((found.logits.argmax(-1) == expected.logits.argmax(-1)).sum())
        targets = ids[:, 1:].flatten()
        self.predictions += len(targets)
        for n, log_probabilities in enumerate((log_q, log_p)):
            self.losses[n] += float(F.nll_loss(log_probabilities[:, :-1].flatten(0, 1), targets, reduction="sum"))
        pairs = zip(found.routers, expected.routers, strict=True)
        same = [float(count) if a is None or b is None else float(same_experts(a, b, expected.top_k).sum()) for a, b in pairs]
        squares = [[float((a - b).square().sum()), float(b.square().sum())] for a, b in zip(found.hiddens, expected.hiddens, strict=True)]
        self.same_routing = [old + new for old, new in zip(self.same_routing or [0.0] * len(same), same, strict=True)]
        old_squares = self.squares or [[0.0, 0.0] for _ in squares]
        self.squares = [[a + c, b + d] for (a, b), (c, d) in zip(old_squares, squares, strict=True)]

    def agreement(self) -> Agreement:
        return Agreement(
            max_error=self.max_error,
            mean_error=self.mean_error / self.tokens,
            kl=max(self.kl / self.tokens, 0.0),  # rounding may leave less than nothing; NaN stays NaN
            top1_agreement=self.top1 / self.tokens,
            routing_agreement=tuple(same / self.tokens for same in self.same_routing),
            hidden_error=tuple(math.sqrt(difference / max(size, 1e-30)) for difference, size in self.squares),
        )


def _compare(decoder: Decoder, reference: Reference, blocks: torch.Tensor) -> tuple[Agreement, float, float]:
    """Agreement over all blocks, and the mean next-token losses of the package and of the reference."""
    sums = _Sums()
    for ids in blocks.split(_BATCH):
        mask = torch.ones_like(ids)
        sums.add(_run(decoder, ids, mask, ids.shape[1]), reference(ids, mask, ids.shape[1]), ids)
    found, expected = (total / sums.predictions for total in sums.losses)
    return sums.agreement(), found, expected
