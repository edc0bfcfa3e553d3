"""Predictions of a package: labels, entities, masked words or vectors.

What the outputs mean is read from the package's own config: its class tells the task, `id2label` the names.

A long text is read in strides where its words have labels: each stretch overlaps the next, and a word's label is taken
from the stretch in which more stands around it. Elsewhere a long text is cut, and the prediction says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.opening import load_tokenizer, open_package
from dense2moe.export.runtime.decoder import CPU, CUDA
from dense2moe.export.runtime.pooling import Pooling, read_pooling
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.variant import Device
from dense2moe.upcycle.checkpoints.class_heads import find_padding, find_task_of, list_labels
from dense2moe.upcycle.checkpoints.processor import load_processor, open_image, process_images
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.words import EncodedText, TextSpan, encode_text
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.tasks.head import OUTSIDE, SEVERAL, VALUE

_BATCH = 8
_MOST_FILLED = 5  # words for a mask
_OVERLAP = 0.25  # of the words of a stretch
_WORDS = re.compile(r"\w+|[^\w\s]")
"""Words of running text: letters and digits together, every other mark by itself, as CoNLL's texts have them."""


@dataclass(frozen=True)
class Scored:
    """A label, or a word for a mask, with its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """An entity: type, text, place, and mean probability.

    `start` and `end` count characters, the end behind the last one.
    """

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """What a package says of one text or image.

    input: the text, or the file's name. labels: the likeliest first; where several may hold, those that do. entities:
    of a text whose words have labels. value: of a score. vector: of a model without a head. is_cut: whether the text
    was longer than the model reads.
    """

    input: str
    labels: tuple[Scored, ...] = ()
    entities: tuple[Entity, ...] = ()
    value: float | None = None
    vector: tuple[float, ...] = ()
    is_cut: bool = False

    def describe(self) -> dict[str, Any]:
        """The same as JSON has it, without what is empty."""
        return {
            name: value for name, value in asdict(self).items() if name == "input" or value not in ((), None, False)
        }


@dataclass
class Predictor:
    """A package of one pass, loaded with its tokenizer or image processor.

    Raises:
        ExportError, UpcycleError: no package there, a damaged one, one that decodes, or of a task that is not predicted
            here.

    Example:
        predictor = Predictor("work/onnx-int8")
        for prediction in predictor.read_texts(["Ada Lovelace lived in London."]):
            print(prediction.entities)
    """

    directory: Path
    device: Device = "cpu"
    task: str = field(init=False)
    labels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.directory = Path(self.directory)
        package = open_package(self.directory)
        if package.has_cache:
            raise ExportError(f"{self.directory}: continues text, token by token; use `dense2moe generate`")
        config = read_config(self.directory)
        self.task, self.labels = find_task_of(config) or "", list_labels(config)
        if self.task not in (*_TEXT_TASKS, "image-classification"):
            raise ExportError(
                f"{self.directory}: is for {self.task or 'no known task'}; predict reads packages for "
                f"{', '.join((*_TEXT_TASKS, 'image-classification'))}"
            )
        self._problem = config.problem_type
        self._run = SinglePass(self.directory, CPU if self.device == "cpu" else CUDA)
        if self.task == "image-classification":
            self._processor = load_processor(self.directory)
            return
        self._tokenizer = load_tokenizer(self.directory)
        self._most_tokens, self._padding = find_context(config), find_padding(config)
        self._pooling = read_pooling(self.directory) if self.task == "feature-extraction" else Pooling()

    def read_texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Iterator[Prediction]:
        """Predictions of texts, or of pairs of texts, in their order.

        Raises:
            ExportError: the package reads images, or there are not as many second texts.
        """
        if self.task == "image-classification":
            raise ExportError(f"{self.directory}: reads images; give image files")
        if pairs is not None and len(pairs) != len(texts):
            raise ExportError(f"{len(texts)} texts and {len(pairs)} second texts; must be as many")
        if self.task == "token-classification":
            yield from (self._read_words(text) for text in texts)
            return
        for start in range(0, len(texts), _BATCH):
            some = texts[start : start + _BATCH]
            others = [None] * len(some) if pairs is None else pairs[start : start + _BATCH]
            encoded = [
                encode_text(self._tokenizer, text, self._most_tokens, pair)
                for text, pair in zip(some, others, strict=True)
            ]
            yield from self._say(some, encoded)

    def read_images(self, files: Sequence[Path]) -> Iterator[Prediction]:
        """Predictions of image files, in their order.

        Raises:
            ExportError, UpcycleError: the package reads text, or a file is no image.
        """
        if self.task != "image-classification":
            raise ExportError(f"{self.directory}: reads text; give texts")
        for start in range(0, len(files), _BATCH):
            some = files[start : start + _BATCH]
            pixels = process_images(self._processor, [open_image(file) for file in some], some[0])
            logits = self._run.run({"pixel_values": pixels})["logits"]
            for file, row in zip(some, logits, strict=True):
                yield Prediction(str(file), self._rank(row))

    def _say(self, texts: Sequence[str], encoded: Sequence[EncodedText]) -> Iterator[Prediction]:
        given = self._pad(encoded)
        found = self._run.run(given)
        for place, (text, read) in enumerate(zip(texts, encoded, strict=True)):
            if self.task == "feature-extraction":
                hidden = found["last_hidden_state"][place][: len(read.ids)]
                yield Prediction(text, vector=tuple(self._pooling(hidden).tolist()), is_cut=read.is_cut)
            elif self.task == "fill-mask":
                yield Prediction(text, self._fill(read.ids, found["logits"][place]), is_cut=read.is_cut)
            elif self._problem == VALUE:
                yield Prediction(text, value=float(found["logits"][place][0]), is_cut=read.is_cut)
            else:
                yield Prediction(text, self._rank(found["logits"][place]), is_cut=read.is_cut)

    def _pad(self, encoded: Sequence[EncodedText]) -> dict[str, torch.Tensor]:
        """All that the graph reads of some texts, padded on the right."""
        length = max(len(text.ids) for text in encoded)

        def pad(rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows])

        return {
            "input_ids": pad([text.ids for text in encoded], self._padding),
            "attention_mask": pad([[1] * len(text.ids) for text in encoded], 0),
            "token_type_ids": pad([text.types or (0,) * len(text.ids) for text in encoded], 0),
        }

    def _rank(self, logits: torch.Tensor) -> tuple[Scored, ...]:
        """Labels by probability; where several may hold, those above one half."""
        if self._problem == SEVERAL:
            scores = logits.sigmoid()
            kept = [number for number in scores.argsort(descending=True).tolist() if scores[number] > 0.5]
        else:
            scores = logits.softmax(-1)
            kept = scores.argsort(descending=True).tolist()
        return tuple(Scored(self.labels[number], float(scores[number])) for number in kept)

    def _fill(self, ids: Sequence[int], logits: torch.Tensor) -> tuple[Scored, ...]:
        masked = [place for place, token in enumerate(ids) if token == self._tokenizer.mask_token_id]
        if len(masked) != 1:
            raise ExportError(f"a text has {len(masked)} masks; must have one {self._tokenizer.mask_token}")
        scores = logits[masked[0]].softmax(-1)
        best = scores.topk(min(_MOST_FILLED, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(Scored(self._tokenizer.decode([token]).strip(), score) for token, score in pairs)

    def _read_words(self, text: str) -> Prediction:
        """Entities of one text, read in strides where it is long."""
        words = [found.span() for found in _WORDS.finditer(text)]
        chosen: list[tuple[int, float]] = []
        begin = 0
        while begin < len(words):
            rest = words[begin:]
            read = encode_text(self._tokenizer, text, self._most_tokens, words=rest, start=rest[0][0])
            logits = self._run.run(self._pad([read]))["logits"][0]
            seen = _count_seen(read, len(rest))
            overlap = int(seen * _OVERLAP) if seen < len(rest) else 0
            kept = seen - overlap // 2  # of what both read, half is this stretch's
            for number in range(len(chosen) - begin, kept):
                chosen.append(_choose(logits, read.firsts[number], self._outside))
            if seen == len(rest):
                break
            begin += max(1, seen - overlap)
        return Prediction(text, entities=tuple(self._join(text, words, chosen)))

    @property
    def _outside(self) -> int:
        return self.labels.index(OUTSIDE) if OUTSIDE in self.labels else 0

    def _join(self, text: str, words: Sequence[TextSpan], chosen: Sequence[tuple[int, float]]) -> Iterator[Entity]:
        """Entities of words' tags; of labels that are no tags, every word."""
        open_words: list[int] = []

        def close() -> Iterator[Entity]:
            if open_words:
                start, end = words[open_words[0]][0], words[open_words[-1]][1]
                kind = self.labels[chosen[open_words[0]][0]].partition("-")[2]
                score = sum(chosen[number][1] for number in open_words) / len(open_words)
                yield Entity(kind, text[start:end], start, end, score)
                open_words.clear()

        for number, (label, score) in enumerate(chosen):
            name = self.labels[label]
            if name == OUTSIDE or "-" not in name:
                yield from close()
                if name != OUTSIDE:
                    start, end = words[number]
                    yield Entity(name, text[start:end], start, end, score)
                continue
            prefix, _, kind = name.partition("-")
            goes_on = open_words and self.labels[chosen[open_words[-1]][0]].partition("-")[2] == kind
            if prefix in ("B", "S", "U") or not goes_on:
                yield from close()
            open_words.append(number)
        yield from close()


_TEXT_TASKS = ("text-classification", "token-classification", "fill-mask", "feature-extraction")


def _count_seen(read: EncodedText, num_words: int) -> int:
    """How many words were read before the text was cut."""
    if not read.is_cut:
        return num_words
    last = max((number for number, first in enumerate(read.firsts) if first is not None), default=0)
    return max(1, last)  # the last one may be cut itself


def _choose(logits: torch.Tensor, first: int | None, outside: int) -> tuple[int, float]:
    """A word's label and probability; outside where it has no token."""
    if first is None:
        return outside, 1.0
    scores = logits[first].softmax(-1)
    label = int(scores.argmax())
    return label, float(scores[label])
