"""Text that routers are read from, as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.building.config import RouterDomain
from dense2moe.upcycle.checkpoints.tokenizer import encode
from dense2moe.upcycle.data.documents import read_file
from dense2moe.upcycle.data.files import match_files
from dense2moe.upcycle.errors import UpcycleError

_MAX_ROW_TOKENS = 512


def tokenize_domain(
    tokenizer: PreTrainedTokenizerBase, domain: RouterDomain, max_tokens: int, base: Path, where: str
) -> list[list[int]]:
    """Rows of a domain's token ids, at most 512 each.

    Every text begins a row of its own. Paths start at `base`; `where` names the domain in errors.

    Raises:
        UpcycleError: the domain has no file, no text or no tokens.
    """
    rows = _tokenize(tokenizer, _read_texts(domain, base, where), max_tokens)
    if not rows:
        raise UpcycleError(f"{where}: its text has no tokens; give other prompts or files")
    return rows


def _read_texts(domain: RouterDomain, base: Path, where: str) -> list[str]:
    texts = list(domain.prompts)
    for file in match_files(domain.files, base, f"{where}.files"):
        text = "".join(read_file(file))
        if not text.strip():  # a tokenizer's own <s> would be all of the domain
            raise UpcycleError(f"{file}: has no text; {where}.files must be files with text; fill it or leave it out")
        texts.append(text)
    return texts


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left = max_tokens
    for text in texts:
        ids = encode(tokenizer, text)[:left]
        rows += [ids[start : start + _MAX_ROW_TOKENS] for start in range(0, len(ids), _MAX_ROW_TOKENS)]
        left -= len(ids)
    return rows
