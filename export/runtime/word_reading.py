"""Words with labels, read in strides; and several tasks at once.

Each stretch of a long text overlaps the next, and a word's label is taken from the stretch in which more stands around
it. The label of a whole text, where another task asks for it, is read of the first stretch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dense2moe.export.runtime.label_reading import Said, read_labels
from dense2moe.export.runtime.predictions import Entity, Prediction
from dense2moe.export.runtime.text_pass import TextPass
from dense2moe.upcycle.checkpoints.class_heads import find_place, list_labels, list_parts
from dense2moe.upcycle.checkpoints.words import EncodedText, TextSpan
from dense2moe.upcycle.tasks.head import OF_WORDS, OUTSIDE, HeadPart, TokenPlace
from dense2moe.upcycle.tasks.several import slice_labels, take_text

_OVERLAP = 0.25  # of the words of a stretch
_WORDS = re.compile(r"\w+|[^\w\s]")
"""Words of running text: letters and digits together, every other mark by itself, as CoNLL's texts have them."""


@dataclass(frozen=True)
class Stretch:
    """Words of a text that were read at once.

    begin: the number of the first. seen: how many were read. kept: of how many this stretch says the labels; others
    are said by the next. logits: [S, labels].
    """

    begin: int
    seen: int
    kept: int
    read: EncodedText
    logits: torch.Tensor


@dataclass
class WordReader:
    """Reads entities of texts."""

    text_pass: TextPass
    labels: tuple[str, ...]

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """Predictions of texts in their order; second texts are not read."""
        for text in texts:
            words = split(text)
            yield Prediction(text, **say_words(text, words, read_stretches(self.text_pass, text, words), self.labels))


@dataclass
class TasksReader:
    """Reads what several tasks with one head say of texts."""

    text_pass: TextPass
    parts: tuple[HeadPart, ...]
    place: TokenPlace

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """Predictions of texts in their order.

        Of pairs of texts, what tasks of whole texts say.
        """
        for number, text in enumerate(texts):
            if pairs is None:
                words = split(text)
                stretches = list(read_stretches(self.text_pass, text, words))
                said = {name: Prediction(text, **own) for name, own in self._say(text, words, stretches)}
                yield Prediction(text, tasks=said, is_cut=len(stretches) > 1 and self._cuts)
            else:
                read = self.text_pass.encode(text, pairs[number])
                whole = Stretch(0, 0, 0, read, self.text_pass.run([read])["logits"][0])
                said = {name: Prediction(text, **own) for name, own in self._say_whole(whole)}
                yield Prediction(text, tasks=said, is_cut=read.is_cut)

    @property
    def _cuts(self) -> bool:
        """Whether a task reads no more than the first stretch."""
        return any(part.task != OF_WORDS for part in self.parts)

    def _say(self, text: str, words: Sequence[TextSpan], stretches: Sequence[Stretch]) -> Iterator[tuple[str, Said]]:
        whole = dict(self._say_whole(stretches[0])) if stretches else {}
        for part, columns in slice_labels(self.parts):
            if part.task == OF_WORDS:
                own = (replace(each, logits=each.logits[:, columns]) for each in stretches)
                yield part.name, say_words(text, words, own, part.labels)
            else:
                yield part.name, whole[part.name]

    def _say_whole(self, stretch: Stretch) -> Iterator[tuple[str, Said]]:
        length = torch.tensor([len(stretch.read.ids)])
        for part, columns in slice_labels(self.parts):
            if part.task != OF_WORDS:
                logits = take_text(stretch.logits[None, :, columns], length, self.place)[0]
                yield part.name, read_labels(logits, part.labels, part.kind)


def open_words(text_pass: TextPass) -> WordReader | TasksReader:
    """A reader of entities, or of all that several tasks say."""
    config = text_pass.config
    parts = list_parts(config)
    return TasksReader(text_pass, parts, find_place(config)) if parts else WordReader(text_pass, list_labels(config))


def split(text: str) -> list[TextSpan]:
    """Where the words of running text stand."""
    return [found.span() for found in _WORDS.finditer(text)]


def read_stretches(text_pass: TextPass, text: str, words: Sequence[TextSpan]) -> Iterator[Stretch]:
    """A text, a stretch at a time."""
    begin = 0
    while True:
        rest = words[begin:]
        read = text_pass.encode(text, None, rest, rest[0][0] if begin else 0)
        logits = text_pass.run([read])["logits"][0]
        seen = _count_seen(read, len(rest))
        overlap = int(seen * _OVERLAP) if seen < len(rest) else 0
        yield Stretch(begin, seen, seen - overlap // 2, read, logits)  # of what both read, half is this one's
        if seen == len(rest):
            return
        begin += max(1, seen - overlap)


def _count_seen(read: EncodedText, num_words: int) -> int:
    """How many words were read before the text was cut."""
    if not read.is_cut:
        return num_words
    last = max((number for number, first in enumerate(read.firsts) if first is not None), default=0)
    return max(1, last)  # the last one may be cut itself


def say_words(text: str, words: Sequence[TextSpan], stretches: Iterable[Stretch], labels: Sequence[str]) -> Said:
    """The entities of a text."""
    outside = labels.index(OUTSIDE) if OUTSIDE in labels else 0
    chosen: list[tuple[int, float]] = []
    for each in stretches:
        for number in range(len(chosen) - each.begin, each.kept):
            chosen.append(_choose(each.logits, each.read.firsts[number], outside))
    return {"entities": tuple(_join(text, words, chosen, labels))}


def _choose(logits: torch.Tensor, first: int | None, outside: int) -> tuple[int, float]:
    """A word's label and probability; outside where it has no token."""
    if first is None:
        return outside, 1.0
    scores = logits[first].softmax(-1)
    label = int(scores.argmax())
    return label, float(scores[label])


def _join(
    text: str, words: Sequence[TextSpan], chosen: Sequence[tuple[int, float]], labels: Sequence[str]
) -> Iterator[Entity]:
    """Entities of words' tags; of labels that are no tags, every word."""
    open_words: list[int] = []

    def close() -> Iterator[Entity]:
        if open_words:
            start, end = words[open_words[0]][0], words[open_words[-1]][1]
            kind = labels[chosen[open_words[0]][0]].partition("-")[2]
            score = sum(chosen[number][1] for number in open_words) / len(open_words)
            yield Entity(kind, text[start:end], start, end, score)
            open_words.clear()

    for number, (label, score) in enumerate(chosen):
        name = labels[label]
        if name == OUTSIDE or "-" not in name:
            yield from close()
            if name != OUTSIDE:
                start, end = words[number]
                yield Entity(name, text[start:end], start, end, score)
            continue
        prefix, _, kind = name.partition("-")
        goes_on = open_words and labels[chosen[open_words[-1]][0]].partition("-")[2] == kind
        if prefix in ("B", "S", "U") or not goes_on:
            yield from close()
        open_words.append(number)
    yield from close()
