"""Make a small dense model of a family without a sparse twin: a GPT-2, a BERT or a ViT.

    python recipes/models/make_hosts.py somewhere/gpt2-1m
    python recipes/models/make_hosts.py somewhere/bert-1m
    python recipes/models/make_hosts.py somewhere/vit-1m
    python recipes/models/make_hosts.py recipes/models/bert-docs-1m
    python recipes/models/make_hosts.py recipes/models/vit-turns

The first three have about a million parameters and learn on the CPU, in about two minutes: GPT-2 the next token and
BERT masked tokens of the running interpreter's documentation, and the ViT to read scikit-learn's handwritten digits.
Written as Hugging Face checkpoints in float32.

The last two are in the repository, in bfloat16, as what recipes with labels start from. They have seen no label: BERT
has learned masked tokens of the documentation, and the ViT by how much a digit was turned (Gidaris et al. 2018,
"Unsupervised Representation Learning by Predicting Image Rotations"), of training images alone.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from dense2moe.upcycle.data.images import process
from dense2moe.upcycle.data.images import read_digits as read_digits_of_sklearn
from dense2moe.upcycle.data.python_docs import read_python_docs
from dense2moe.upcycle.data.splitting import divide_rows
from dense2moe.upcycle.tasks.masked_token import Masking, read_masking

TOKENIZER = Path(__file__).parent / "python-docs-1m"
HIDDEN, INNER, LAYERS, HEADS = 128, 512, 4, 4
CONTEXT = 128
DOCS_VOCABULARY, ROW = 500, 48
SMALL_VOCABULARY, SHORT = 400, 32  # BERT's, so that minutes are enough for it to read what stands around a mask
HELD_OUT_DIGITS = 400
UNREAD = -100  # what transformers' losses leave out

Batch = dict[str, torch.Tensor]


def read_blocks(tokenizer: PreTrainedTokenizerBase, split: Any) -> torch.Tensor:
    """A split of the documentation in blocks, int64 [N, CONTEXT]."""
    ids: list[int] = []
    for document in read_python_docs().documents[split]:
        ids += [*tokenizer(document.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def mask(blocks: torch.Tensor, masking: Masking) -> Batch:
    """Blocks with masked tokens, and the labels of those alone."""
    labels = blocks.masked_fill(~masking.choose(blocks), UNREAD)
    return {"input_ids": masking.corrupt(blocks), "labels": labels}


def read_digits() -> tuple[Batch, Batch]:
    """Images of digits, float32 [N, 1, 8, 8] between -1 and 1, and their labels: to learn from, and held out."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    learned, held_out = slice(HELD_OUT_DIGITS, None), slice(HELD_OUT_DIGITS)
    return (
        {"pixel_values": images[learned], "labels": labels[learned]},
        {"pixel_values": images[held_out], "labels": labels[held_out]},
    )


def learn(model: PreTrainedModel, steps: int, peak: float, draw: Callable[[torch.Generator], Batch]) -> None:
    """AdamW, 50 steps of warm-up, cosine to a fiftieth of the peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * min(step / steps, 1.0))))
    )
    generator, started = torch.Generator().manual_seed(0), time.monotonic()
    model.train()
    for step in range(steps):
        loss = model(**draw(generator)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def pick(rows: Batch, size: int, generator: torch.Generator) -> Batch:
    """Some rows, drawn."""
    chosen = torch.randint(len(next(iter(rows.values()))), (size,), generator=generator)
    return {name: values[chosen] for name, values in rows.items()}


def make_gpt2(output: Path) -> None:
    """Next tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    shape = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ids))
    blocks = read_blocks(tokenizer, "train")
    rows = {"input_ids": blocks, "labels": blocks}
    learn(model, 500, 3e-3, lambda generator: pick(rows, 16, generator))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def draw_bert(tokenizer: PreTrainedTokenizerBase, context: int) -> BertForMaskedLM:
    """A BERT that has learned nothing yet."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def train_vocabulary(size: int) -> PreTrainedTokenizerBase:
    """The embedded tokenizer with fewer pieces, learned from the documentation."""
    documents = (document.text for document in read_python_docs().documents["train"])
    trained: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOKENIZER).train_new_from_iterator(
        documents, size, show_progress=False
    )
    return trained


def make_bert(output: Path) -> None:
    """Masked tokens, of a small vocabulary: parts of words, which others around them tell."""
    tokenizer = train_vocabulary(SMALL_VOCABULARY)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model = draw_bert(tokenizer, SHORT)
    rows = {"input_ids": read_blocks(tokenizer, "train").view(-1, SHORT)}
    masking = read_masking(tokenizer, "bert-1m")
    learn(model, 900, 2e-3, lambda generator: mask(pick(rows, 64, generator)["input_ids"], masking))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def make_vit(output: Path) -> None:
    """Labels of digits."""
    config = ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )
    model, (rows, _) = ViTForImageClassification(config), read_digits()
    learn(model, 500, 1e-3, lambda generator: pick(rows, 64, generator))
    model.save_pretrained(output)
    # images of 0 to 16 become -1 to 1
    ViTImageProcessor(
        size={"height": 8, "width": 8}, do_convert_rgb=False, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(output)


def make_docs_bert(output: Path) -> None:
    """Masked tokens, of the documentation's vocabulary."""
    tokenizer = train_vocabulary(DOCS_VOCABULARY)
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")],
    )
    model = draw_bert(tokenizer, CONTEXT)
    rows = {"input_ids": read_framed(tokenizer)}
    masking = read_masking(tokenizer, output.name)
    learn(model, 1200, 2e-3, lambda generator: mask(pick(rows, 48, generator)["input_ids"], masking))
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def read_framed(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The documentation in rows between [CLS] and [SEP], int64 [N, ROW]."""
    ids: list[int] = []
    for document in read_python_docs().documents["train"]:
        ids += tokenizer(document.text, verbose=False, add_special_tokens=False)["input_ids"]
    inner = ROW - 2
    rows = torch.tensor(ids[: len(ids) // inner * inner]).view(-1, inner)
    edges = [torch.full((len(rows), 1), each) for each in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([edges[0], rows, edges[1]], 1)


def make_turns_vit(output: Path) -> None:
    """By how many quarters a digit was turned."""
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        id2label={number: f"{90 * number} degrees" for number in range(4)},
        label2id={f"{90 * number} degrees": number for number in range(4)},
    )
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, do_convert_rgb=False, rescale_factor=1 / 255, image_mean=[0.5], image_std=[0.5]
    )
    rows = divide_rows({"train": read_digits_of_sklearn()}).rows["train"]
    images = process(processor, rows)
    turned = torch.cat([images.rot90(number, (2, 3)) for number in range(4)])
    labels = torch.arange(4).repeat_interleave(len(images))
    model = ViTForImageClassification(config)
    learn(model, 600, 1e-3, lambda generator: pick({"pixel_values": turned, "labels": labels}, 64, generator))
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)


MAKERS = {
    "gpt2-1m": make_gpt2,
    "bert-1m": make_bert,
    "vit-1m": make_vit,
    "bert-docs-1m": make_docs_bert,
    "vit-turns": make_turns_vit,
}


def main() -> None:
    """Train and write one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help=f"directory whose name is one of {', '.join(MAKERS)}")
    output: Path = parser.parse_args().output
    if output.name not in MAKERS:
        parser.error(f"output is {output}; its name must be one of {', '.join(MAKERS)}")
    torch.manual_seed(0)
    MAKERS[output.name](output)


if __name__ == "__main__":
    main()
