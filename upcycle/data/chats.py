"""Conversations: rendered by the tokenizer's chat template, learned where the assistant speaks.

1. A template with `{% generation %}` tags says itself which tokens are the assistant's.
2. Any other is rendered turn by turn. What stands before an assistant's turn, with the prompt for it, must begin what
   stands with it, and that must begin the whole: then the assistant's text is what was added, without white space
   behind its last mark. A template for which that does not hold is refused, with the turn.
3. Prompts and completions are conversations of one question where there is a template; without one they are joined as
   they are, and end with the end token.

Every conversation is a row of its own, padded on the right: none sees another. One that is longer than `block_size` is
cut, and counted; one that has nothing left to learn is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.data.config import ChatData, DataConfig
from dense2moe.upcycle.data.files import text_files
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.data.rows import read_rows
from dense2moe.upcycle.data.splitting import divide_rows
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, UNLABELLED

TEMPLATE_NAME = "chat_template.jinja"
CHATS = "text-generation"
"""The task of conversations, as Hugging Face names it."""

_GENERATION = "generation %}"
_ASSISTANT = "assistant"


@dataclass(frozen=True)
class Chat:
    """A conversation, or a prompt with its completion; where it stands."""

    where: str
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def key(self) -> str:
        """What tells it from others: all but the answers."""
        asked = [message for message in self.messages if message["role"] != _ASSISTANT]
        return json.dumps([*asked, self.prompt], sort_keys=True)

    @property
    def answer(self) -> str:
        """What the assistant says."""
        said = [str(message["content"]) for message in self.messages if message["role"] == _ASSISTANT]
        return "\n".join([*said, self.completion])


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a conversation, and which of them are learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    def cut(self, most: int) -> EncodedChat:
        """Its first tokens."""
        return EncodedChat(self.ids[:most], self.learned[:most])


def prepare_chats(
    source: Path, output: Path, config: DataConfig, data: ChatData, base: Path, progress: Progress
) -> dict[str, Any]:
    """Write `train`, `validation` and `test` as safetensors; returns the facts.

    `input_ids`, `attention_mask` and `labels` int32 [N, S]: a label is the token itself where it is learned. A template
    that the recipe gives is written beside them, and goes along with the trained model.

    Raises:
        UpcycleError: a row is no conversation, the tokenizer has no chat template, or it cannot be split.
    """
    tokenizer = _load(source, data, base)
    rows = _read_splits(data, base)
    facts: dict[str, Any] = {
        "block_size": 0,
        "num_tokens": {},
        "num_examples": {},
        "domains": ["text"],
        "digest": _digest(rows.rows),
        "task": CHATS,
        "num_shared_with_held_out": rows.num_shared,
        "num_cut": {},
        "num_left_out": {},
        "num_learned_tokens": {},
    }
    for number, split in enumerate(SPLITS):
        progress("encoding", number, len(SPLITS))
        every = rows.rows[split]
        some = [every[place] for place in choose_evenly(len(every), getattr(config, f"max_{split}_examples")).tolist()]
        whole = [encode_chat(tokenizer, chat) for chat in some]
        encoded = [chat for each in whole if any((chat := each.cut(config.block_size)).learned)]
        if len(encoded) < 2:
            raise UpcycleError(
                f"data.source: the {split} split has {len(encoded)} conversations with something to learn in their "
                f"first {config.block_size} tokens; must have two or more; give more, or raise data.block_size"
            )
        tensors = _pad(encoded, tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
        save_file({**tensors, "domains": torch.zeros(len(encoded), dtype=torch.int32)}, output / f"{split}.safetensors")
        facts["num_examples"][split] = len(encoded)
        facts["num_tokens"][split] = int(tensors[MASK].sum())
        facts["num_learned_tokens"][split] = int((tensors[LABELS] != UNLABELLED).sum())
        facts["num_cut"][split] = sum(len(each.ids) > config.block_size for each in whole)
        facts["num_left_out"][split] = len(whole) - len(encoded)
        facts["block_size"] = max(facts["block_size"], tensors[IDS].shape[1])
    if data.template is not None:
        (output / TEMPLATE_NAME).write_text(str(tokenizer.chat_template), encoding="utf-8")
    progress("encoding", len(SPLITS), len(SPLITS))
    return facts


def check_chats(source: Path, data: ChatData, base: Path) -> None:
    """Refuse what `prepare_chats` would; one conversation of a split is encoded.

    Raises:
        UpcycleError: as `prepare_chats`.
    """
    tokenizer = _load(source, data, base)
    for rows in _read_splits(data, base).rows.values():
        for chat in rows[:1]:
            encode_chat(tokenizer, chat)


def _load(source: Path, data: ChatData, base: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source)
    if data.template is not None:
        file = base / Path(data.template).expanduser()
        with one_line_errors(file, "cannot be read", "give a template of Jinja, as transformers has them"):
            tokenizer.chat_template = file.read_text(encoding="utf-8")
    if not tokenizer.is_fast:
        raise UpcycleError(
            f"{source}: the tokenizer does not tell where its tokens stand; put its tokenizer.json there"
        )
    return tokenizer


def _read_splits(data: ChatData, base: Path) -> Any:
    given: dict[Split, list[Chat]] = {}
    for split, files in text_files(data, base).items():
        if files:
            given[split] = [make_chat(values, data, where) for file in files for where, values in read_rows(file)]
    return divide_rows(given)


def make_chat(values: Mapping[str, Any], data: ChatData, where: str) -> Chat:
    """A row as a conversation.

    Raises:
        UpcycleError: it has no messages, one of them is wrong, or the assistant says nothing.
    """
    if data.messages in values:
        messages = values[data.messages]
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise UpcycleError(
                f'{where}: \'{data.messages}\' is no list of messages; must be [{{"role": …, "content": …}}]'
            )
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UpcycleError(f"{where}: message {number} lacks a role or content; must have both")
        if not any(message["role"] == _ASSISTANT for message in messages):
            raise UpcycleError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
        return Chat(where, tuple(messages))
    prompt, completion = (values.get(name) for name in (data.prompt, data.completion))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
        raise UpcycleError(
            f"{where}: has {shorten(', '.join(map(str, values)))}; must have '{data.messages}', or texts "
            f"'{data.prompt}' and '{data.completion}'; name the columns in data.source"
        )
    return Chat(where, prompt=prompt, completion=completion)


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> EncodedChat:
    """A conversation's tokens, and which of them the assistant says.

    Raises:
        UpcycleError: there is no template, or it cannot be split.
    """
    messages = list(chat.messages)
    if not messages:
        if not tokenizer.chat_template:
            return _join(tokenizer, chat)
        messages = [{"role": "user", "content": chat.prompt}, {"role": _ASSISTANT, "content": chat.completion}]
    if not tokenizer.chat_template:
        raise UpcycleError(
            f"{chat.where}: is a conversation, and the tokenizer has no chat template; give data.source.template"
        )
    if _GENERATION in str(tokenizer.chat_template):
        return _read_tags(tokenizer, messages, chat.where)
    return _split(tokenizer, messages, chat.where)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str, prompt: bool = False) -> str:
    with one_line_errors(Path(where), "the chat template fails on it", "mend the conversation, or the template"):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def _read_tags(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str) -> EncodedChat:
    """The tokens between a template's own generation tags."""
    with one_line_errors(Path(where), "the chat template fails on it", "mend the conversation, or the template"):
        found: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    return EncodedChat(tuple(found["input_ids"]), tuple(map(bool, found["assistant_masks"])))


def _split(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str) -> EncodedChat:
    """The tokens that each assistant's turn adds to what stands before it."""
    whole = _render(tokenizer, messages, where)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        before = _render(tokenizer, messages[:number], where, prompt=True)
        until = _render(tokenizer, messages[: number + 1], where)
        if not until.startswith(before) or not whole.startswith(until.rstrip()):
            raise UpcycleError(
                f"{where}: the chat template writes turn {number} otherwise when more follows, or without the prompt "
                "for it; so what the assistant says cannot be told from the rest; put {% generation %} tags into the "
                "template"
            )
        spans.append((len(before), len(until.rstrip())))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [
        first < last and any(begin <= first < end for begin, end in spans) for first, last in found["offset_mapping"]
    ]
    return EncodedChat(tuple(found["input_ids"]), tuple(learned))


def _join(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> EncodedChat:
    """A prompt and its completion as they are, with the end token."""
    asked = tokenizer(chat.prompt, verbose=False)["input_ids"]
    said = tokenizer(chat.completion, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if end and asked[-1:] == end and len(asked) > 1:
        asked = asked[:-1]
    return EncodedChat((*asked, *said, *end), (False,) * len(asked) + (True,) * (len(said) + len(end)))


def _pad(chats: Sequence[EncodedChat], filling: int) -> dict[str, torch.Tensor]:
    length = max(len(chat.ids) for chat in chats)

    def rows() -> Iterator[tuple[list[int], list[int], list[int]]]:
        for chat in chats:
            rest = length - len(chat.ids)
            labels = [token if own else UNLABELLED for token, own in zip(chat.ids, chat.learned, strict=True)]
            yield [*chat.ids, *[filling] * rest], [1] * len(chat.ids) + [0] * rest, [*labels, *[UNLABELLED] * rest]

    ids, mask, labels = (torch.tensor(each, dtype=torch.int32) for each in zip(*rows(), strict=True))
    return {IDS: ids, MASK: mask, LABELS: labels}


def _digest(rows: Mapping[Split, Sequence[Chat]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for chat in rows[split]:
            digest.update(f"{split}\0{chat.key}\0{chat.answer}\0".encode())
    return digest.hexdigest()
