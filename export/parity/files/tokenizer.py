"""A package's tokenizer beside the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dense2moe.export.parity.files.sentences import as_ids, show, show_ids, tell_wrong
from dense2moe.export.parity.files.sides import Failure, Sides, attempt, read_json, tell_missing
from dense2moe.export.parity.records import FilesCheck
from dense2moe.upcycle.checkpoints.config_files import TOKENIZER_CONFIG_NAME

_TEMPLATE_NAME = "chat_template.jinja"
_VOCABULARY_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)

_TOKENIZER_JSON_NAMES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)

_ENGLISH = "The quick brown fox doesn't jump over 13 lazy dogs; “why”, it asks – and naïve café-goers shrug."
_CODE = "def f(x: int) -> str:\n\tif x != 0x1F:\n        return f'{x:>8}' + \"\\n\"  # done\n\n\nprint(f(-3.14e-5))\r\n"
_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "\t\t x \t",
    "a",
    " a",
    "a ",
    "Hello world",
    " Hello  World ",
    "HELLO hello HeLLo",
    "don't I'LL we've",
    "0 1 23 456 7890 12345678901234567890",
    "3.14159, 1,000,000 and 2026-11-30",
    "<a href='x'>&amp;</a> {\"k\": [1, null]}",
    "https://a.b/c?d=e&f=%20#g",
    "😀 👩‍👩‍👧 🇫🇷 ✅",
    "中文字符和日本語のテキスト、한국어 문장",
    "Привет мир، مرحبا بالعالم",
    "e\u0301 é ﬁ ½ ™ \u00a0\u200b\ufeff\u2028x",
    "\x00\x07\x7f",
    "▁ Ġ Ċ",
    _ENGLISH,
    _CODE,
    " ".join([_ENGLISH, _CODE] * 50),
)


def vocabulary_name(directory: Path) -> str:
    """The name of the file that holds a directory's vocabulary."""
    return next((name for name in _VOCABULARY_NAMES if (directory / name).is_file()), _VOCABULARY_NAMES[0])


def load_tokenizer(directory: Path, config: Any) -> Any:
    """The tokenizer in a directory, of the class that fits `config`.

    None where there is none, a `Failure` where it does not load.
    """
    if not (directory / vocabulary_name(directory)).is_file():
        return None
    found = attempt(
        lambda: AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False, local_files_only=True)
    )
    if isinstance(found, Failure):
        for name in _TOKENIZER_JSON_NAMES:  # transformers does not say which file it was
            if (directory / name).is_file() and isinstance(broken := attempt(read_json, directory / name), Failure):
                return Failure(f"{name}: {broken.reason}")
    return found


def check_tokenizer(sides: Sides) -> FilesCheck:
    """Compare vocabularies, ids of texts, special tokens and chat templates."""
    name = vocabulary_name(sides.package)
    in_package, in_twin = (
        (directory / vocabulary_name(directory)).is_file() for directory in (sides.package, sides.twin)
    )
    if not (in_package and in_twin):
        return tell_missing(name if in_package else vocabulary_name(sides.twin), in_package, in_twin, sides.is_ours)
    if sides.tokenizer is None:
        return FilesCheck()  # the checkpoint's does not load, which has been told
    tokenizer = load_tokenizer(sides.package, sides.config)
    if isinstance(tokenizer, Failure):
        return FilesCheck(
            (name,),
            (),
            (
                f"{name}: the package's tokenizer cannot be read ({tokenizer.reason}); must be the checkpoint's; "
                "copy it",
            ),
        )
    return FilesCheck((name,), (), tuple(_compare_tokenizers(name, tokenizer, sides.tokenizer)))


def _compare_tokenizers(name: str, tokenizer: Any, expected: Any) -> Iterator[str]:
    vocabularies = tokenizer.get_vocab(), expected.get_vocab()
    if vocabularies[0] != vocabularies[1]:  # then texts differ too, and say nothing more
        yield _tell_vocabulary(name, *vocabularies)
    elif (sentence := _tell_texts(name, tokenizer, expected)) is not None:
        yield sentence
    for token in ("bos", "eos", "pad", "unk"):
        found, right = (getattr(each, f"{token}_token_id") for each in (tokenizer, expected))
        if found != right:
            yield tell_wrong(f"{TOKENIZER_CONFIG_NAME}: the id of {token}_token", found, show_ids(as_ids(right)))
    found, right = (_as_template(each.chat_template) for each in (tokenizer, expected))
    if found != right:
        yield tell_wrong(f"{_TEMPLATE_NAME} or {TOKENIZER_CONFIG_NAME}: chat_template", *_tell_template(found, right))


def _tell_vocabulary(name: str, found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    ours, theirs = ({number: token for token, number in vocabulary.items()} for vocabulary in (found, expected))
    every = sorted(ours.keys() | theirs.keys())
    wrong = [number for number in every if ours.get(number) != theirs.get(number)]
    if not wrong:
        token = min(token for token in found.keys() | expected.keys() if found.get(token) != expected.get(token))
        return (
            f"{name}: the token {show(token)} has the id {show(found.get(token))} in the package; must be "
            f"{show(expected.get(token))}"
        )
    tokens = [show(each[wrong[0]]) if wrong[0] in each else "no token" for each in (ours, theirs)]
    return (
        f"{name}: id {wrong[0]} is {tokens[0]} in the package; must be {tokens[1]}; {len(wrong):,} of "
        f"{len(every):,} ids differ"
    )


def _tell_texts(name: str, tokenizer: Any, expected: Any) -> str | None:
    """A sentence on the first text with other tokens; None without one.

    The text is encoded or decoded differently.
    """
    added = {str(token) for each in (tokenizer, expected) for token in each.added_tokens_decoder.values()}
    texts = [*_TEXTS, *(text for token in sorted(added) for text in (token, f"a {token} b"))]
    rows: list[list[int] | Failure] = []
    for adds, how in ((False, "without"), (True, "with")):
        found, rows = (_encode(each, texts, adds) for each in (tokenizer, expected))
        if wrong := [n for n in range(len(texts)) if _as_row(found[n]) != _as_row(rows[n])]:
            what = _tell_row(found[wrong[0]], rows[wrong[0]])
            return (
                f"{name}: the text {show(texts[wrong[0]])}, encoded {how} special tokens, {what}; {len(wrong):,} "
                f"of {len(texts):,} texts differ"
            )
    encoded = [row for row in rows if not isinstance(row, Failure)]
    for skips, how in ((False, "with"), (True, "without")):
        back, right = ([attempt(_decode, each, row, skips) for row in encoded] for each in (tokenizer, expected))
        if wrong := [n for n in range(len(encoded)) if back[n] != right[n]]:
            what = f"{show(back[wrong[0]])} in the package; must be {show(right[wrong[0]])}"
            return (
                f"{name}: ids decoded {how} special tokens are the text {what}; {len(wrong):,} of "
                f"{len(encoded):,} texts differ"
            )
    return None


def _encode(tokenizer: Any, texts: Sequence[str], adds_special: bool) -> list[list[int] | Failure]:
    """Token ids of every text; a tokenizer may refuse some."""

    def encode(given: str | Sequence[str]) -> Any:
        return tokenizer(given, add_special_tokens=adds_special, verbose=False)["input_ids"]

    found: list[list[int] | Failure] | Failure = attempt(encode, texts)
    return [attempt(encode, text) for text in texts] if isinstance(found, Failure) else found


def _decode(tokenizer: Any, ids: Sequence[int], skips_special: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skips_special)
    return text


def _as_row(row: list[int] | Failure) -> list[int] | None:
    """Token ids, or none where a text is refused.

    Any error of the tokenizer counts as a refusal.
    """
    return None if isinstance(row, Failure) else row


def _tell_row(found: list[int] | Failure, right: list[int] | Failure) -> str:
    place = 0 if isinstance(found, Failure) or isinstance(right, Failure) else _find_parting(found, right)
    ours, theirs = (
        f"refused ({row.reason})" if isinstance(row, Failure) else show(row[place:]) for row in (found, right)
    )
    return f"is {ours} in the package, from token {place} on; must be {theirs}"


def _find_parting(one: Sequence[Any], other: Sequence[Any]) -> int:
    """First index where two sequences differ, or the shorter's end."""
    return next(
        (n for n, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other))
    )


def _as_template(template: Any) -> Any:
    """A chat template without the final newline that Jinja also drops."""
    return template.removesuffix("\n") if isinstance(template, str) else template


def _tell_template(found: Any, right: Any) -> tuple[Any, str]:
    """Both long templates from their first difference on.

    The sentence says what the package has and what the checkpoint has.
    """
    if not (isinstance(found, str) and isinstance(right, str)):
        return found, "none" if right is None else show(right)
    place = _find_parting(found, right)
    return found[place:], f"{show(right[place:])} from character {place} on"
