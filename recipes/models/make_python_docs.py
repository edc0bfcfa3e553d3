"""Make an embedded dense checkpoint: a small Llama that has read CPython's documentation.

    python recipes/models/make_python_docs.py recipes/models/python-docs-1m
    python recipes/models/make_python_docs.py recipes/models/python-docs-4m

Trains a byte-level BPE and a four-layer Llama, of the size that the directory's name says, on the data set `python-
docs` of the running interpreter, on the CPU, and writes a Hugging Face checkpoint in bfloat16 with its tokenizer and
a model card that states the recipe, the time and the held-out loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dense2moe.upcycle.data.held_out import SPLITS, Document
from dense2moe.upcycle.data.python_docs import PythonDocs, read_python_docs

CONTEXT = 512
BATCH = 8
END = "<|endoftext|>"
PAD = "<|pad|>"
PROSE_REPEATS = (
    2  # prose is a quarter of the text; seen twice an epoch, the model writes documentation and not only code
)
PROMPTS = (
    "The for statement is used to",
    "class Queue\n    Create a queue object with a given maximum size.\n\nQueue.get(self, block=True, timeout=None)\n",
    "Return a string",
    'def read_lines(path):\n    """',
    "Exceptions are",
)


@dataclass(frozen=True)
class Size:
    """What differs between the models: shape, and length and rate of training."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    steps: int
    peak_lr: float
    purpose: str


SIZES = {
    "python-docs-1m": Size(2048, 128, 384, 4, 2, 2200, 3e-3, "the dense checkpoint of `recipes/quickstart.yaml`"),
    "python-docs-4m": Size(4096, 256, 768, 8, 4, 3600, 2.5e-3, "the dense checkpoint of the other recipes"),
}


def train_tokenizer(docs: PythonDocs, size: Size) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the train split; ids 0 and 1 are the end-of-text and the padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((d.text for d in docs.documents["train"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def name_tokenizer_class(path: Path) -> None:
    """Name the class as transformers 4 and other readers know it; transformers 5 writes a name of its own."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """All documents one after another, each ended by the end-of-text token; int64 [num_tokens]."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean next-token loss in nats over consecutive blocks of the context length."""
    model.eval()
    blocks = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in blocks.split(16)]
    model.train()
    return sum(losses) / len(blocks)


def train(docs: PythonDocs, tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> LlamaForCausalLM:
    """AdamW, linear warm-up of 100 steps, cosine to a fiftieth of the peak, bfloat16 autocast."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.03,
    )
    model = LlamaForCausalLM(config).train()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.peak_lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(s / size.steps, 1.0))))
    )
    documents = [d for d in docs.documents["train"] for _ in range(PROSE_REPEATS if d.domain == "prose" else 1)]
    validation = encode(tokenizer, list(docs.documents["validation"]))
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.empty(0, CONTEXT, dtype=torch.long)
    epoch, started = 0, time.monotonic()
    encoded = [encode(tokenizer, [d]) for d in documents]
    for step in range(size.steps):
        if len(blocks) < BATCH:
            order = torch.randperm(len(encoded), generator=generator)
            stream = torch.cat([encoded[i] for i in order])
            fresh = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
            blocks = torch.cat([blocks, fresh[torch.randperm(len(fresh), generator=generator)]])
            epoch += 1
        batch, blocks = blocks[:BATCH], blocks[BATCH:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} epoch {epoch} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 400 == 399:
            print(f"step {step} validation {held_out_loss(model, validation[: 40 * CONTEXT]):.4f}", flush=True)
    return model.eval()


def model_card(name: str, docs: PythonDocs, facts: dict[str, str], samples: list[tuple[str, str]]) -> str:
    """The README of the checkpoint."""
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    texts = "\n\n".join(f"Prompt `{prompt!r}`:\n\n```text\n{prompt}{text}\n```" for prompt, text in samples)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small dense Llama, pretrained from nothing on CPython {docs.version}'s own documentation and source (help topics,
docstrings, standard library), as read from the running interpreter by `upcycle/data/python_docs.py`. It is
{SIZES[name].purpose}: real enough to show perplexity, routing and quantization at work, small enough
for two CPU cores. It knows nothing but how Python documentation sounds.

The texts that it learned from are under the PSF licence, and are not part of this repository.

| fact | value |
|---|---|
{rows}

Made by `python recipes/models/make_python_docs.py recipes/models/{name}`.

## Samples

Temperature 0.7, top-k 40, 100 tokens, seed 0.

{texts}
"""


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help=f"directory whose name is one of {', '.join(SIZES)}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    name = arguments.output.name
    if name not in SIZES:
        parser.error(f"output is {arguments.output}; its name must be one of {', '.join(SIZES)}")
    size = SIZES[name]
    docs = read_python_docs()
    tokenizer = train_tokenizer(docs, size)
    streams = {split: encode(tokenizer, list(docs.documents[split])) for split in SPLITS}
    print({split: len(stream) for split, stream in streams.items()}, flush=True)
    started = time.monotonic()
    model = train(docs, tokenizer, size, arguments.seed).to(torch.bfloat16)
    minutes = (time.monotonic() - started) / 60
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    name_tokenizer_class(arguments.output / "tokenizer_config.json")
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1).save_pretrained(arguments.output)
    model = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    losses = {split: held_out_loss(model, streams[split]) for split in ("validation", "test")}
    characters = {split: sum(len(d.text) for d in docs.documents[split]) for split in SPLITS}
    samples = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = tokenizer(END + prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=100, do_sample=True, temperature=0.7, top_k=40)
        samples.append((prompt, tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "architecture": f"Llama: 4 layers, hidden {size.hidden_size}, FFN {size.intermediate_size}, "
        f"{size.num_heads} heads / {size.num_kv_heads} KV heads, context {CONTEXT}, tied embeddings",
        "tokenizer": f"byte-level BPE, {size.vocab_size} entries",
        "stored as": "bfloat16",
        "text": f"CPython {docs.version}, SHA-256 {docs.digest}",
        "tokens": ", ".join(f"{split} {len(stream):,}" for split, stream in streams.items()),
        "training": f"{size.steps} steps of {BATCH} x {CONTEXT} tokens, prose seen {PROSE_REPEATS} times an "
        "epoch, AdamW (0.9, 0.95), weight "
        f"decay 0.1, peak learning rate {size.peak_lr:g}, warm-up 100 steps, cosine, clipping 1.0, bfloat16 "
        f"autocast, seed {arguments.seed}",
        "time": f"{minutes:.0f} minutes on {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{time.strftime('%Y-%m-%d')}",
        **{
            f"{split} loss": f"{loss:.4f} nats a token, perplexity {math.exp(loss):.3f}, "
            f"{loss * len(streams[split]) / characters[split] / math.log(2):.3f} bits a character"
            for split, loss in losses.items()
        },
    }
    (arguments.output / "README.md").write_text(model_card(name, docs, facts, samples), encoding="utf-8")
    print(facts)


if __name__ == "__main__":
    main()
