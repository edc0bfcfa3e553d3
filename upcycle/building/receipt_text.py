"""The text that both models read for the receipt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dense2moe.upcycle.checkpoints.layerwise import pad_left
from dense2moe.upcycle.checkpoints.mixture_classes import find_class
from dense2moe.upcycle.checkpoints.tokenizer import encode, has_tokenizer, load_tokenizer
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.models.table import find_hosted

DECODE_STEPS = 8
_MAX_TOKENS = 640
_MAX_WINDOW_TOKENS = 2048  # a text is made longer than _MAX_TOKENS only to cross a window, and no longer than this
# read for each token that is wanted: many times what tokens of English have, and a small part of the text
_LETTERS_PER_TOKEN = 64
_MOST_LETTERS = 32_768  # in which two tokenizers have every occasion to differ that English and Python give


@dataclass(frozen=True)
class Text:
    """Three rows of token ids, their mask, and what they leave out.

    Padded on the left; ids and mask are int64 [3, S].

    Padded on the left; ids and mask are int64.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    notes: tuple[str, ...]

    def shorten(self, length: int) -> Text:
        """The last tokens of each row."""
        return Text(self.ids[:, -length:], self.mask[:, -length:], self.notes)


NO_TEXT = Text(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64), ())
"""Of a model that reads images or sound alone."""


def reads_text(config: Any) -> bool:
    """Whether a model of this config reads token ids.

    A decoder alone that does, such as Whisper's, or codes of patches, as BEiT's, are none.
    """
    hosted = find_hosted(config)
    return hosted is None or "input_ids" in inspect.signature(find_class(hosted).forward).parameters


def read_text(source: Path, block_size: int) -> Text:
    """Three rows of real English, padded on the left.

    One is longer than a block and than a window, two are shorter. The text is this package's own documentation: at hand
    on every machine, and tokens that follow each other as in real text. A checkpoint without a tokenizer gets seeded
    random ids instead.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    own = config.get_text_config()
    context = find_context(config)
    window = getattr(config, "sliding_window", None) or 0
    beyond = window + 4 * DECODE_STEPS
    wanted = max(min(_MAX_TOKENS, block_size + block_size // 4), beyond if beyond <= _MAX_WINDOW_TOKENS else 0)
    length = max(2 * DECODE_STEPS, min(wanted, context))
    notes: tuple[str, ...] = ()
    if length <= window < context:
        notes = (
            f"the text of {length} tokens does not cross the window of {window}; only the config shows that the window "
            "was kept",
        )
    if has_tokenizer(source):
        text = (read_prose() * 4)[: _LETTERS_PER_TOKEN * length]
        stream = encode(load_tokenizer(source), text)
    else:
        stream = torch.randint(own.vocab_size, (4 * length,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, mask = pad_left(
        [stream[row : row + count] for row, count in enumerate((length, max(DECODE_STEPS + 1, length // 2), 3))]
    )
    return Text(ids, mask, notes)


def compare_tokenizers(source: Path, output: Path) -> Iterator[str]:
    """How the two directories' tokenizers differ, in words; empty if they agree.

    transformers chooses its class, and so its rules, by the model beside it too.
    """
    if not has_tokenizer(source):
        return
    text = read_prose()
    dense, sparse = (load_tokenizer(path) for path in (source, output))
    if encode(dense, text) != encode(sparse, text):
        yield (
            "transformers tokenizes text differently beside the mixture and beside the dense model: by "
            f"{type(sparse).__name__} and by {type(dense).__name__}; set tokenizer_class in tokenizer_config.json to "
            "the right class, and check that tokenizer.json has its rules"
        )


@cache
def read_prose() -> str:
    """The source of modules beside this one, with its documentation."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)[:_MOST_LETTERS]
