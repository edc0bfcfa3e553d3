"""Texts read at once, in batches: labels, words for a mask, vectors.

What is longer than the model reads is cut, and the prediction says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.export.errors import ExportError
from dense2moe.export.runtime.label_reading import Said, read_labels
from dense2moe.export.runtime.predictions import Prediction, Scored
from dense2moe.export.runtime.text_pass import TextPass
from dense2moe.upcycle.checkpoints.class_heads import list_labels
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.checkpoints.words import EncodedText
from dense2moe.upcycle.tasks.pooling import Pooling, pool

_BATCH = 8
_MOST_FILLED = 5  # words for a mask

Say = Callable[[EncodedText, Mapping[str, torch.Tensor]], Said]
"""What the outputs of one text mean."""


@dataclass
class RowReader:
    """Reads texts, or pairs of texts, a batch at a time."""

    text_pass: TextPass
    say: Say

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """Predictions of texts in their order."""
        for start in range(0, len(texts), _BATCH):
            some = texts[start : start + _BATCH]
            others = [None] * len(some) if pairs is None else pairs[start : start + _BATCH]
            encoded = [self.text_pass.encode(text, pair) for text, pair in zip(some, others, strict=True)]
            outputs = self.text_pass.run(encoded)
            for place, (text, read) in enumerate(zip(some, encoded, strict=True)):
                said = self.say(read, {name: output[place] for name, output in outputs.items()})
                yield Prediction(text, is_cut=read.is_cut, **said)


def open_labels(text_pass: TextPass) -> RowReader:
    """A reader of labels or values."""
    labels, kind = list_labels(text_pass.config), text_pass.config.problem_type
    return RowReader(text_pass, lambda _, outputs: read_labels(outputs["logits"], labels, kind))


def open_vectors(text_pass: TextPass) -> RowReader:
    """A reader of vectors, pooled as the settings say."""
    return RowReader(text_pass, partial(_pool, read_pooling(text_pass.directory)))


def open_fillings(text_pass: TextPass) -> RowReader:
    """A reader of words for the mask of each text."""
    return RowReader(text_pass, partial(_fill, text_pass.tokenizer))


def _pool(pooling: Pooling, read: EncodedText, outputs: Mapping[str, torch.Tensor]) -> Said:
    hidden = outputs["last_hidden_state"][None, : len(read.ids)]
    (vector,) = pool(hidden, torch.ones(hidden.shape[:2]), pooling)
    return {"vector": tuple(vector.tolist())}


def _fill(tokenizer: PreTrainedTokenizerBase, read: EncodedText, outputs: Mapping[str, torch.Tensor]) -> Said:
    masked = [place for place, token in enumerate(read.ids) if token == tokenizer.mask_token_id]
    if len(masked) != 1:
        raise ExportError(f"a text has {len(masked)} masks; must have one {tokenizer.mask_token}")
    scores = outputs["logits"][masked[0]].softmax(-1)
    best = scores.topk(min(_MOST_FILLED, len(scores)))
    words = tokenizer.batch_decode([[token] for token in best.indices.tolist()])
    pairs = zip(words, best.values.tolist(), strict=True)
    return {"labels": tuple(Scored(word.strip(), score) for word, score in pairs)}
