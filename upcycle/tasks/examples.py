"""Examples: what a model reads, each with its domain.

Examples of plain text are blocks of token ids, all of one length. Labelled texts are padded on the right to the longest
of their split; `batch` cuts what all of them have as padding. Images are all of one size. An example of several texts
that belong together has a row for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

IDS, MASK, TYPES, PIXELS, LABELS = "input_ids", "attention_mask", "token_type_ids", "pixel_values", "labels"
PARTS = "parts"
"""The number of each example's task, of several at once; each has labels of its own (`labels_of`)."""
SPAN_STARTS, SPAN_ENDS, QUESTIONS = "span_starts", "span_ends", "questions"
"""Of windows: where in the context each token stands [N, S], and the number of each one's question [N]."""
UNLABELLED = -100
"""The label of a token that has none, as transformers' losses leave it out."""


def labels_of(part: int) -> str:
    """The name of the labels of one task of several."""
    return f"{LABELS}.{part}"


@dataclass(frozen=True)
class Examples:
    """Tensors of examples by name, and each example's domain number.

    The first dimension is the example. Of texts `input_ids` are int64 [N, S]; padded ones have an `attention_mask` of
    the same shape, 0 at padding; of examples of K texts both are [N, K, S]. `domains` is int64 [N]. `image_tokens`:
    positions that an image becomes.
    """

    tensors: Mapping[str, torch.Tensor]
    domains: torch.Tensor
    image_tokens: int = 0

    @classmethod
    def of_blocks(cls, ids: torch.Tensor, domains: torch.Tensor | None = None) -> Examples:
        """Blocks of token ids [N, block_size], of one domain unless told."""
        return cls({IDS: ids}, torch.zeros(len(ids), dtype=torch.int64) if domains is None else domains)

    def __len__(self) -> int:
        return len(self.domains)

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, int64 [N, S]."""
        return self.tensors[IDS]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each example; int64 [N]."""
        if MASK in self.tensors:
            return self.tensors[MASK].flatten(1).sum(-1)
        return torch.full((len(self),), self._size, dtype=torch.int64)

    @property
    def block_size(self) -> int:
        """Tokens of an example; where padded, the mean of real ones."""
        return max(1, round(float(self.lengths.double().mean()))) if MASK in self.tensors else self._size

    @property
    def _size(self) -> int:
        return self.tensors[IDS].shape[1] if IDS in self.tensors else self.image_tokens

    def take(self, places: torch.Tensor | slice) -> Examples:
        """The examples at some places, in their order."""
        tensors = {name: tensor[places] for name, tensor in self.tensors.items()}
        return Examples(tensors, self.domains[places], self.image_tokens)

    def alone(self) -> Examples:
        """Each text as an example by itself.

        Of examples of several texts these, without what they are together; else the same.
        """
        mask = self.tensors.get(MASK)
        if mask is None or mask.ndim == 2:
            return self
        texts = {name: tensor.flatten(0, 1) for name, tensor in self.tensors.items() if tensor.shape == mask.shape}
        return Examples(texts, self.domains.repeat_interleave(mask.shape[1]))

    def rows(self) -> list[list[int]]:
        """The real token ids of each text."""
        return [ids[:length].tolist() for ids, length in zip(self.ids, self.lengths.tolist(), strict=True)]

    def of_domain(self, number: int) -> Examples:
        """The examples of one domain, in their order."""
        return self.take(self.domains == number)

    def split(self, count: int) -> list[Examples]:
        """The same in parts of `count` examples; the last may be smaller."""
        return [self.take(slice(start, start + count)) for start in range(0, len(self), count)]

    def parts_by_length(self, count: int) -> list[torch.Tensor]:
        """Places of `count` examples each, of about the same length.

        In their order where all have one length; the last part may be smaller.
        """
        padded = MASK in self.tensors
        return list((self.lengths.argsort(stable=True) if padded else torch.arange(len(self))).split(count))

    def batch(self) -> dict[str, torch.Tensor]:
        """All of them as one batch, without columns of padding."""
        return trim(dict(self.tensors))

    def batches(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """All of them, `count` of about the same length at a time."""
        return (self.take(places).batch() for places in self.parts_by_length(count))


def trim(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without the last columns that are padding in every row."""
    if (mask := batch.get(MASK)) is None:
        return batch
    length = max(1, int(mask.sum(-1).max()))
    return {name: tensor[..., :length] if is_of_tokens(tensor, mask) else tensor for name, tensor in batch.items()}


def is_of_tokens(tensor: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a tensor has a whole number for each token.

    A text of which several labels may hold has a real number for each, and there may be as many as tokens.
    """
    return tensor.shape == mask.shape and not tensor.is_floating_point()
