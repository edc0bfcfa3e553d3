"""Of a conversation the assistant's turns are learned, and nothing else, whatever the template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dense2moe.export.parity.agreement import measure_losses
from dense2moe.export.parity.forward import open_reference
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks, read_counted, read_facts
from dense2moe.upcycle.data.chats import Chat, encode_chat
from dense2moe.upcycle.data.config import ChatData, DataConfig
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.chat import CHAT
from dense2moe.upcycle.tasks.examples import UNLABELLED

LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}says {% generation %}{{ message.content }} . "
    "{% endgeneration %}{% else %}asks {{ message.content }} ? {% endif %}{% endfor %}"
)
FORGETFUL = "{% for message in messages %}{{ loop.length }} {{ message.content }} {% endfor %}"
"""It writes every turn otherwise when more follows, as templates do that drop old thoughts."""

MESSAGES = (
    {"role": "user", "content": "How are you"},
    {"role": "assistant", "content": "Well thanks"},
    {"role": "user", "content": "Good"},
    {"role": "assistant", "content": "Bye now"},
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, mark in brackets, line end and other character."""
    made = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"<[^>]*>|\w+|\n|[^\w\s]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def told(tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[list[str], list[str]]:
    """All tokens of the conversation as text, and the learned ones."""
    tokenizer.chat_template = template
    found = encode_chat(tokenizer, Chat("here", MESSAGES))
    text = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = [text[first:last] for first, last in spans]
    assert len(words) == len(found.ids)
    return words, [word for word, own in zip(words, found.learned, strict=True) if own]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (LLAMA, ["Well", " ", "thanks", "<|eot_id|>", "Bye", " ", "now", "<|eot_id|>"]),
        (QWEN, ["Well", " ", "thanks", "<|im_end|>", "Bye", " ", "now", "<|im_end|>"]),
        (GEMMA, ["Well", " ", "thanks", "<end_of_turn>", "Bye", " ", "now", "<end_of_turn>"]),
    ],
    ids=["llama3", "qwen", "gemma"],
)
def test_the_assistant_s_words_and_their_end_are_learned(
    tokenizer: PreTrainedTokenizerFast, template: str, learned: list[str]
) -> None:
    words, found = told(tokenizer, template)
    assert found == learned
    assert "Good" in words


def test_a_template_s_own_tags_are_believed(tokenizer: PreTrainedTokenizerFast) -> None:
    _, found = told(tokenizer, TAGGED)
    assert "".join(found).split() == ["Well", "thanks", ".", "Bye", "now", "."]


def test_a_template_that_cannot_be_split_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(UpcycleError, match=r"^here: the chat template writes turn 1 otherwise .*generation %} tags"):
        encode_chat(tokenizer, Chat("here", MESSAGES))


def test_conversations_need_a_template_and_completions_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UpcycleError, match=r"^here: is a conversation, and the tokenizer has no chat template"):
        encode_chat(tokenizer, Chat("here", MESSAGES))
    found = encode_chat(tokenizer, Chat("here", prompt="one two", completion=" three"))
    assert found.learned == (False,) * 3 + (True,) * 3  # the end token too
    assert found.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user"}]}', "message 0 lacks a role or content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ('{"prompt": "a"}', "must have 'messages', or texts 'prompt' and 'completion'"),
        ("[1]", "is no JSON object"),
    ],
)
def test_a_bad_row_is_told_by_file_and_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: str, what: str
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(UpcycleError, match=rf"chats\.jsonl:2: .*{what}"):
        prepare_chats(tmp_path, {"train": ["chats.jsonl"]})


def prepare_chats(folder: Path, source: dict[str, object], block_size: int = 64) -> Path:
    output = folder / "data"
    output.mkdir()
    config = DataConfig(source=ChatData(kind="chats", **source), block_size=block_size)
    prepare_data(folder / "model", output, config, folder, lambda *_: None)
    return output


def test_what_is_written_are_padded_rows_whose_labels_are_learned_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "template").write_text(QWEN)
    rows = []
    for number in range(60):
        question = {"role": "user", "content": f"question {number} " * (1 + number % 3)}
        rows.append({"messages": [question, {"role": "assistant", "content": f"answer {number}"}]})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = prepare_chats(tmp_path, {"train": ["chats.jsonl"], "template": "template"})
    facts = read_facts(data)
    assert sum(facts["num_examples"].values()) == 60
    assert (data / "chat_template.jinja").read_text() == QWEN
    examples = read_examples(data, "train")
    mask, labels = examples.tensors["attention_mask"].bool(), examples.tensors["labels"]
    learned = labels != UNLABELLED
    assert not learned[~mask].any()
    assert torch.equal(labels[learned], examples.ids[learned])
    assert facts["num_learned_tokens"]["train"] == int(learned.sum())
    # what calibrates and judges a package is the same text without its padding
    assert read_blocks(data, "train").numel() <= facts["num_tokens"]["train"]


def test_a_padded_batch_has_the_losses_of_its_conversations_one_at_a_time() -> None:
    """And they are transformers' own, whose labels of -100 count nowhere."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    ).eval()
    lengths = (9, 4, 13)
    ids, mask, labels = (torch.full((3, 13), fill) for fill in (0, 0, UNLABELLED))
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 50, (length,))
        mask[row, :length] = 1
        labels[row, 2:length] = ids[row, 2:length]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        together = CHAT.loss(model(**CHAT.inputs(batch)).logits, batch)
        alone = [
            model(input_ids=ids[row : row + 1, :length], labels=labels[row : row + 1, :length]).loss
            for row, length in enumerate(lengths)
        ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_a_package_is_judged_by_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Blocks of held-out conversations, and which of their tokens count: the loss is transformers' own with -100."""
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"q {number} of all", "completion": f"a {number}"} for number in range(80)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = prepare_chats(tmp_path, {"train": ["chats.jsonl"]})
    blocks, counted = read_blocks(data, "train"), read_counted(data, "train")
    assert counted is not None
    assert blocks.shape == counted.shape
    learned, written = counted.float().mean(), read_facts(data)
    assert float(learned) == pytest.approx(
        written["num_learned_tokens"]["train"] / written["num_tokens"]["train"], abs=0.02
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with open_reference(tmp_path / "llama") as reference, torch.no_grad():
        found = measure_losses(reference, blocks, counted=counted)
        wanted = [
            reference.model(input_ids=ids[None], labels=ids.masked_fill(~own, UNLABELLED)[None]).loss.item()
            for ids, own in zip(blocks, counted, strict=True)
        ]
    assert found == pytest.approx(wanted, rel=1e-5)
