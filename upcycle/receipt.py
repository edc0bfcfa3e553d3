"""The receipt: measured proof that upcycling kept the function.

Both checkpoints are loaded by plain `AutoModelForCausalLM`, so nothing of ours stands between the files and the figures. "rel" is
max |MoE logits - dense logits| / max |dense logits| over real (not padded) positions. With copied experts and a zero router, k = 2 weighs both
experts with exactly one half, and the sum is bitwise the dense FFN; every other router rounds, at most `ROUNDING_LIMIT` in float32.

One thing of torch's stands between: transformers applies the activation to one half of a fused product, and on the CPU torch computes the last
elements of such a strided row of SiLU by another exp than those of a contiguous one. Where the FFN's width is no multiple of the vector length (172
is not, 768 is), the two models differ in the last bit although every weight is equal; with GELU they do at any width. The receipt tries the
activation at the width; there it asks for rounding instead of bitwise equality.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN

from upcycle.checkpoint import TOKENIZER_NAMES, open_checkpoint
from upcycle.errors import UpcycleError
from upcycle.mapping import CopyExpert, Keep, UpcyclePlan
from upcycle.progress import Progress

ROUNDING_LIMIT = 1e-5
"""Largest rel in float32 of a router that weighs experts unequally: measured 5e-7 to 1e-6 on 4 to 32 layers, times ten."""

_MAX_TOKENS = 640
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """One comparison of the two models: which router, dtype and text, what came out, and whether torch could be bitwise at this width."""

    router: str
    dtype: str
    text: str
    num_tokens: int
    rel: float
    bitwise: bool
    bitwise_due: bool


def write_receipt(source: Path, output: Path, copied: bool, num_experts_per_tok: int, block_size: int, progress: Progress) -> tuple[Comparison, ...]:
    """Compare the dense checkpoint with the mixture of experts made from it.

    `copied` says that experts are plain copies; only then is the function kept and the limits are enforced. `block_size` is the length in tokens of
    a training block: one text is longer than that.

    Raises:
        UpcycleError: a limit is broken, so the written checkpoint does not compute what the dense one does.
    """
    comparisons: list[Comparison] = []
    ids, mask = _texts(source, block_size)
    for number, (name, dtype) in enumerate(_DTYPES.items()):
        dense, sparse = load_model(source, dtype), load_model(output, dtype)
        progress("comparing with the dense model", number, len(_DTYPES))
        for text, tokens, attention in (("one long text", ids[:1], mask[:1] | 1), ("padded batch", ids, mask)):
            reference = _logits(dense, tokens, attention)
            for router in ("shipped", "zero"):
                with _router(sparse, router):
                    found = _logits(sparse, tokens, attention)
                real = attention.bool()
                rel = float((found - reference)[real].abs().max() / reference[real].abs().max())
                equal = bool(torch.equal(found[real], reference[real]))
                comparisons.append(Comparison(router, name, text, tokens.shape[1], rel, equal, _can_be_bitwise(dense, dtype)))
    progress("comparing with the dense model", len(_DTYPES), len(_DTYPES))
    if copied:
        _check(comparisons, num_experts_per_tok, output)
    return tuple(comparisons)


def check_copies(source: Path, output: Path, plan: UpcyclePlan, progress: Progress) -> int:
    """Read every kept tensor and every copied expert back and compare it with the dense one, bit by bit; returns how many there are.

    The logits of a zero router show only the experts that a tie falls on; this shows all of them.

    Raises:
        UpcycleError: a tensor on disk is not the one that it was copied from.
    """
    dense, mixture = open_checkpoint(source), open_checkpoint(output)
    copies = [write for write in plan.writes if isinstance(write.rule, Keep | CopyExpert)]
    held_name, held = "", torch.empty(0)
    for number, write in enumerate(copies, 1):
        assert isinstance(write.rule, Keep | CopyExpert)
        if write.rule.source != held_name:
            held_name, held = write.rule.source, dense.read(write.rule.source)
        if not torch.equal(mixture.read(write.spec.name).view(torch.uint8), held.view(torch.uint8)):
            raise UpcycleError(f"{output}: tensor '{write.spec.name}' on disk differs from '{held_name}', of which it is a copy; check the disk")
        progress("reading copies back", number, len(copies))
    return len(copies)


def _check(comparisons: list[Comparison], num_experts_per_tok: int, output: Path) -> None:
    for c in comparisons:
        if c.router == "zero" and num_experts_per_tok in (1, 2) and c.bitwise_due and not c.bitwise:
            raise UpcycleError(f"{output}: zero router, {c.dtype}, {c.text}: differs from the dense model by {c.rel:.1e}; it must be bitwise equal")
        if c.dtype == "float32" and not c.rel <= ROUNDING_LIMIT:
            raise UpcycleError(f"{output}: {c.router} router, {c.text}: differs from the dense model by {c.rel:.1e}; at most {ROUNDING_LIMIT:.0e}")


def load_model(directory: Path, dtype: torch.dtype, task: str = "text-generation") -> PreTrainedModel:
    """Load a model by transformers alone and refuse what it would only warn about; `task` names the head as Hugging Face names tasks.

    Raises:
        UpcycleError: weights are missing, left over or of another shape.
    """
    auto_class = TasksManager.get_model_class_for_task(task, framework="pt")
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
    if next(router_weights(model), None) is not None:
        # The default, grouped_mm, refuses bfloat16 experts whose rows are no multiple of 16 bytes; eager takes every width.
        model.set_experts_implementation("eager")
    return cast(PreTrainedModel, model.eval())


def _can_be_bitwise(dense: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether torch's activation of a strided row is bitwise that of a contiguous one, at the FFN's width and dtype, on this machine.

    A million values, since rounding to bfloat16 hides nearly all differences: of GELU's, one value in twenty thousand shows.
    """
    width = dense.config.intermediate_size
    fused = torch.randn(max(64, 1_000_000 // width), 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate = fused.chunk(2, dim=-1)[0]
    activation = ACT2FN[dense.config.hidden_act]
    return torch.equal(activation(gate), activation(gate.contiguous()))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, model(input_ids=ids, attention_mask=mask, use_cache=False).logits).to(torch.float32)


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


def router_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The router weight [num_experts, hidden] of each layer, in order: the parameter `gate.weight` beside stacked experts."""
    for module in model.modules():
        if hasattr(module, "experts") and hasattr(module, "gate"):
            yield cast(torch.nn.Parameter, cast(torch.nn.Module, module.gate).weight)


def _texts(source: Path, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of real English, one longer than a block and two shorter, padded on the left; ids and mask, int64 [3, length].

    The text is this package's own documentation: at hand on every machine, and tokens that follow each other as in real text. A checkpoint
    without a tokenizer gets seeded random ids instead.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    length = max(16, min(_MAX_TOKENS, block_size + block_size // 4, config.max_position_embeddings))
    if any((source / name).is_file() for name in TOKENIZER_NAMES):
        text = inspect.getsource(sys.modules[__name__])
        stream = torch.tensor(AutoTokenizer.from_pretrained(source, local_files_only=True)(text * 4, verbose=False)["input_ids"])
    else:
        stream = torch.randint(config.vocab_size, (4 * length,), generator=torch.Generator().manual_seed(0))
    lengths = (length, length // 2, 3)
    ids = torch.full((len(lengths), length), int(stream[0]))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(lengths):
        ids[row, length - count :] = stream[row : row + count]
        mask[row, length - count :] = 1
    return ids, mask
