"""Small tokenizers of every kind, made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = [*map(chr, range(33, 127)), "é", "😀", "\ufffd"]
CONTRACTIONS = ["'t", "'s", "n't", "'ve", "'re", "'m", "the"]


def _wrap(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def byte_level(**settings: Any) -> PreTrainedTokenizerFast:
    """Bytes without merges, as of GPT-2, Llama 3 and Qwen; nothing is put before a text."""
    tokenizer = Tokenizer(models.BPE(_numbered([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, **settings)


def byte_fallback(**settings: Any) -> PreTrainedTokenizerFast:
    """Pieces, and bytes for what is none, as of Llama 2 and Mistral; `<s>` is put before a text."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *CONTRACTIONS, "▁n", "▁'", "▁the"]
    tokenizer = Tokenizer(models.BPE(_numbered(names), [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(tokenizer, **settings)


def metaspace(**settings: Any) -> PreTrainedTokenizerFast:
    """Pieces with their likelihoods, as of T5 and XLM-R; `</s>` is put after a text."""
    names = dict.fromkeys([*SPECIAL, "▁", *LETTERS, *CONTRACTIONS, "▁n", "▁'", "▁.", "▁the"])
    tokenizer = Tokenizer(models.Unigram([(name, -1.0 - number / 10) for number, name in enumerate(names)], 2, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(tokenizer, **settings)


def word_piece(cleanup: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """Words and their ends, as of BERT."""
    names = [*SPECIAL, *LETTERS, *CONTRACTIONS, *(f"##{name}" for name in ("a", "n", "t", "s", "'"))]
    tokenizer = Tokenizer(models.WordPiece(_numbered(names), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return _wrap(tokenizer, **settings)


_CLEANS = {"clean_up_tokenization_spaces": True}
_ALWAYS = _CLEANS | {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
TOKENIZERS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, told to clean up": lambda: byte_level(**_CLEANS),
    "byte level, cleans up": lambda: byte_level(**_ALWAYS),
    "byte fallback": byte_fallback,
    "byte fallback, cleans up": lambda: byte_fallback(**_ALWAYS),
    "metaspace": metaspace,
    "metaspace, cleans up": lambda: metaspace(**_CLEANS),
    "word piece": word_piece,
    "word piece, cleans up": lambda: word_piece(cleanup=False, **_CLEANS),
}
