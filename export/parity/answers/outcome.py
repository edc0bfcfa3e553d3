"""Answers to a task's examples, by torch and by the package.

Rows of like length are a batch, padded at their right, where a decoder's tokens do not see it; so no mask is needed,
and any package can be asked. A choice is scored by the sum of its tokens' log-probabilities after the prompt (Brown et
al. 2020, section 2.4). Two texts are compared by the cosine of the means over tokens of what the last layer gives,
before the final norm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.parity.answers.examples import Answer, MultipleChoice, Similarity, TaskFile
from dense2moe.export.parity.forward import Reference
from dense2moe.export.parity.ways.free_text import write_greedily
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.generation import Generation
from dense2moe.export.runtime.text import start_ids
from dense2moe.upcycle.checkpoints.tokenizer import encode
from dense2moe.upcycle.errors import shorten

_BATCH = 16
_MOST_LOGITS = 2**26  # of a batch at once: 256 MB
Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ScoredRow:
    """Token ids, scored from index `start` on.

    Each is scored by the logits before it; `start` is 1 at least.
    """

    ids: Ids
    start: int

    @property
    def fed(self) -> Ids:
        """Tokens that are fed: all but the last, which is only scored."""
        return self.ids[:-1]


@dataclass(frozen=True)
class EncodedTask:
    """A task as token ids.

    An example is rows by choice, one prompt, or two texts. `ends`: the tokens that end a written answer. `switch`: a
    row beyond so many tokens changes what is computed of all of them, so none that is shorter is padded to more; see
    `rotary_switch`.
    """

    task: TaskFile
    rows: tuple[tuple[ScoredRow, ...], ...]
    ends: frozenset[int]
    switch: int | None = None


@dataclass(frozen=True)
class ModelAnswer:
    """One model's answer to one example.

    values: the log-likelihood of each choice in nats, or the cosine of two texts. ids, text: what was written. scale:
    what an error of 1 relative to the largest logit, or to the length of a hidden state, could change a value by.
    """

    values: tuple[float, ...] = ()
    ids: Ids = ()
    text: str = ""
    scale: float = 1.0

    @property
    def chosen(self) -> int:
        """The most likely choice."""
        return max(range(len(self.values)), key=self.values.__getitem__)


class Model(Protocol):
    """A model as tasks need it."""

    def logits(self, ids: torch.Tensor, num_kept: int) -> torch.Tensor:
        """Logits [B, num_kept, V] of the last tokens of ids [B, S]."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens with logits."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The last layer's output [B, S, H], or None if not shown."""

    def write(self, prompt: Ids, num_tokens: int, stop: frozenset[int]) -> Ids:
        """Greedy tokens after a prompt, at most `count`, until `stop`."""


@dataclass(frozen=True)
class PackageModel:
    """A package."""

    decoder: Decoder

    @property
    def vocab_size(self) -> int:
        """See `Model`."""
        return self.decoder.vocab_size

    def logits(self, ids: torch.Tensor, num_kept: int) -> torch.Tensor:
        """See `Model`."""
        return torch.from_numpy(
            self.decoder.run(self.decoder.new_cache(*ids.shape), ids.numpy(), logits_to_keep=num_kept)[names.LOGITS]
        )

    def hidden(self, ids: torch.Tensor) -> torch.Tensor | None:
        """See `Model`."""
        streams = [name for name in self.decoder.taps if names.is_hidden(name)]  # layer by layer
        if not streams:
            return None
        return torch.from_numpy(
            self.decoder.run(self.decoder.new_cache(*ids.shape), ids.numpy(), logits_to_keep=1)[streams[-1]]
        )

    def write(self, prompt: Ids, num_tokens: int, stop: frozenset[int]) -> Ids:
        """See `Model`."""
        return tuple(write_greedily(self.decoder, prompt, num_tokens, stop))


@dataclass(frozen=True)
class TorchModel:
    """A torch reference; it writes by transformers' own `generate`."""

    reference: Reference

    @property
    def vocab_size(self) -> int:
        """See `Model`."""
        return int(self.reference.model.config.vocab_size)

    def logits(self, ids: torch.Tensor, num_kept: int) -> torch.Tensor:
        """See `Model`."""
        return self.reference.forward(ids, torch.ones_like(ids)).logits[:, -num_kept:]

    def hidden(self, ids: torch.Tensor) -> torch.Tensor | None:
        """See `Model`."""
        return self.reference.forward(ids, torch.ones_like(ids)).hiddens[-1]

    @torch.inference_mode()
    def write(self, prompt: Ids, num_tokens: int, stop: frozenset[int]) -> Ids:
        """See `Model`."""
        ids = torch.tensor([prompt])
        model = self.reference.model
        # the likeliest tokens, whatever the checkpoint's own forbids, forces or makes rarer
        model.generation_config = GenerationConfig()
        with self.reference.rounding:
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=sorted(stop) or None,
                pad_token_id=min(stop, default=0),
            )
        return tuple(found[0, len(prompt) :].tolist())


def encode_task(
    task: TaskFile, tokenizer: Any, generation: Generation, context: int, num_tokens: int, switch: int | None = None
) -> EncodedTask:
    """A task as token ids; prompts too long lose their beginning.

    Raises:
        ExportError: a choice, an answer of `num_tokens` or a text to be compared does not fit into the context.
    """
    rows = []
    for number, example in enumerate(task.examples, 1):
        where = f"task '{task.name}', example {number}"
        match example:
            case MultipleChoice():
                rows.append(_encode_choices(example, tokenizer, generation.start, context, where))
            case Answer():
                if num_tokens >= context:
                    raise ExportError(
                        f"parity.answer_tokens is {num_tokens}; must be less than the model's context, which is "
                        f"{context}"
                    )
                rows.append(
                    (ScoredRow(_encode(tokenizer, example.prompt, generation.start, where)[num_tokens - context :], 1),)
                )
            case Similarity(texts=texts):
                rows.append(tuple(ScoredRow(_encode(tokenizer, text, generation.start, where), 1) for text in texts))
                if (longest := max(len(row.ids) for row in rows[-1])) > context:
                    raise ExportError(
                        f"{where}: a text has {longest} tokens; the model's context holds {context}; shorten it"
                    )
    return EncodedTask(task, tuple(rows), frozenset(generation.ends), switch)


def _encode(tokenizer: Any, text: str, start: int | None, where: str) -> Ids:
    ids = start_ids(tokenizer, text, start)
    if not ids:
        what = f"the text {shorten(text)!r} has no tokens" if text else "the prompt is empty"
        raise ExportError(f"{where}: {what}, and the tokenizer has no token that starts a text; give some text")
    return tuple(ids)


def _encode_choices(
    example: MultipleChoice, tokenizer: Any, start_token: int | None, context: int, where: str
) -> tuple[ScoredRow, ...]:
    """Rows scored from the first token that differs from the prompt's.

    Prompt and choice are one text, whose tokens may lie across both.
    A prompt without tokens is the token that starts a text, before every choice.
    """
    prompt = _encode(tokenizer, example.prompt, start_token, where)
    whole = [_encode(tokenizer, example.prompt + choice, start_token, where) for choice in example.choices]
    if not encode(tokenizer, example.prompt):
        whole = [prompt + ids for ids in whole]
    start = max(1, min(min(_find_parting(prompt, ids), len(ids) - 1) for ids in whole))
    rows = []
    for ids in whole:
        cut = max(0, len(ids) - 1 - context)
        if len(ids) < 2 or cut >= start:
            raise ExportError(
                f"{where}: a choice has {len(ids) - start} tokens; the model's context holds {context}; must have "
                "some, and fit"
            )
        rows.append(ScoredRow(ids[cut:], start - cut))
    return tuple(rows)


def _find_parting(one: Ids, other: Ids) -> int:
    """First index at which two rows differ, or the shorter's end."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def answer_task(model: Model, encoded: EncodedTask, tokenizer: Any, num_tokens: int) -> list[ModelAnswer] | None:
    """A model's answer to every example; None where it cannot."""
    match encoded.task.kind:
        case "choice":
            return _choose(model, encoded)
        case "similarity":
            return _compare(model, encoded)
        case "answer":
            examples = cast("tuple[Answer, ...]", encoded.task.examples)
            return [
                _write(model, row, example, tokenizer, num_tokens, encoded.ends)
                for (row,), example in zip(encoded.rows, examples, strict=True)
            ]


def _batches(rows: Iterable[Ids], model: Model, switch: int | None) -> Iterator[tuple[list[Ids], torch.Tensor]]:
    """Distinct rows batched by similar length, with their ids [B, S]."""
    batch: list[Ids] = []
    most_tokens = _MOST_LOGITS // model.vocab_size
    for row in sorted(dict.fromkeys(rows), key=len, reverse=True):
        may_be_padded = switch is None or not batch or len(batch[0]) <= switch or len(batch[0]) == len(row)
        if batch and (len(batch) == _BATCH or (len(batch) + 1) * len(batch[0]) > most_tokens or not may_be_padded):
            yield batch, _pad(batch)
            batch = []
        batch.append(row)
    if batch:
        yield batch, _pad(batch)


def _pad(rows: Sequence[Ids]) -> torch.Tensor:
    """Rows as ids [B, S], longest first, padded by their last token."""
    return torch.tensor([row + row[-1:] * (len(rows[0]) - len(row)) for row in rows])


def _choose(model: Model, encoded: EncodedTask) -> list[ModelAnswer]:
    examples = encoded.rows
    readers: dict[Ids, list[tuple[int, int]]] = defaultdict(list)
    for n, rows in enumerate(examples):
        for c, row in enumerate(rows):
            readers[row.fed].append((n, c))
    values = [[0.0] * len(rows) for rows in examples]
    largest = [0.0] * len(examples)
    for batch, ids in _batches(readers, model, encoded.switch):
        # the logits of the tokens before it are of no use
        first = min(examples[n][c].start for fed in batch for n, c in readers[fed]) - 1
        logits = model.logits(ids, ids.shape[1] - first).float()
        scores = logits.log_softmax(-1)
        for place, fed in enumerate(batch):
            for n, c in readers[fed]:
                targets, start = examples[n][c].ids[examples[n][c].start :], examples[n][c].start - 1 - first
                told = slice(start, start + len(targets))
                values[n][c] = float(scores[place, told].gather(-1, torch.tensor(targets)[:, None]).double().sum())
                largest[n] = max(largest[n], float(logits[place, told].abs().max()))
    scales = [
        2 * most * sum(sorted(len(row.ids) - row.start for row in rows)[-2:])
        for most, rows in zip(largest, examples, strict=True)
    ]
    return [ModelAnswer(tuple(found), scale=scale) for found, scale in zip(values, scales, strict=True)]


def _compare(model: Model, encoded: EncodedTask) -> list[ModelAnswer] | None:
    means: dict[Ids, torch.Tensor] = {}
    stretch: dict[Ids, float] = {}
    for texts, ids in _batches((row.ids for rows in encoded.rows for row in rows), model, encoded.switch):
        hidden = model.hidden(ids)
        if hidden is None:
            return None
        for text, padded in zip(texts, hidden.double(), strict=True):
            states = padded[: len(text)]
            means[text] = states.mean(0)
            stretch[text] = float(states.norm(dim=-1).max() / means[text].norm())
    pairs = [(a.ids, b.ids) for a, b in encoded.rows]
    return [
        ModelAnswer((float(F.cosine_similarity(means[a], means[b], dim=0)),), scale=stretch[a] + stretch[b])
        for a, b in pairs
    ]


def _write(
    model: Model, row: ScoredRow, example: Answer, tokenizer: Any, num_tokens: int, stop: frozenset[int]
) -> ModelAnswer:
    ids = model.write(row.ids, num_tokens, stop)
    return ModelAnswer(
        ids=ids, text=tokenizer.decode(ids, skip_special_tokens=True).partition(example.until)[0].strip()
    )


def written_gap(reference: Reference, prompt: Ids, found: Ids, own: Ids) -> float:
    """Where two written texts part.

    What the reference's logit of its own token has above that of the other, relative to the largest; else 0.
    """
    parting = _find_parting(found, own)
    if parting == min(len(found), len(own)):
        return 0.0
    ids = torch.tensor([[*prompt, *own[:parting]]])
    logits = reference.forward(ids, torch.ones_like(ids), len(prompt)).logits[0, -1]
    # each of two logits may be off
    return float((logits[own[parting]] - logits[found[parting]]) / logits.abs().max()) / 2
