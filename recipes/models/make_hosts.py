"""Make a small dense model of a family without a sparse twin: a GPT-2, a BERT or a ViT.

    python recipes/models/make_hosts.py somewhere/gpt2-1m
    python recipes/models/make_hosts.py somewhere/bert-1m
    python recipes/models/make_hosts.py somewhere/vit-1m

Each has about a million parameters and learns on the CPU, in about two minutes: GPT-2 the next token and BERT masked
tokens of the running interpreter's documentation, and the ViT to read scikit-learn's handwritten digits. Written as
Hugging Face checkpoints in float32.
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

from dense2moe.upcycle.data.python_docs import read_python_docs
from dense2moe.upcycle.tasks.masked_token import Masking, read_masking

TOKENIZER = Path(__file__).parent / "python-docs-1m"
HIDDEN, INNER, LAYERS, HEADS = 128, 512, 4, 4
CONTEXT = 128
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


def make_bert(output: Path) -> None:
    """Masked tokens, of a small vocabulary: parts of words, which others around them tell."""
    trained = AutoTokenizer.from_pretrained(TOKENIZER).train_new_from_iterator(
        (document.text for document in read_python_docs().documents["train"]), SMALL_VOCABULARY, show_progress=False
    )
    trained.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer: PreTrainedTokenizerBase = trained
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=SHORT,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
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


MAKERS = {"gpt2-1m": make_gpt2, "bert-1m": make_bert, "vit-1m": make_vit}


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
