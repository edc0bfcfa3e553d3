"""Training tokens per second: dense2moe, transformers' own Mixtral step, and a dense model with the same active FFN.

    python benchmarks/finetune.py

All are the Trainer of transformers over the same blocks, with the same AdamW and clipping, one step after the other;
seconds are of whole steps. A Mixtral of random weights (4 layers, 512/1408, 8 experts of which 2 are chosen, vocabulary
4096; 79 M parameters) is trained

- by dense2moe: `dense2moe.upcycle.training.trainer`, with its balance loss a layer;
- by transformers alone, with `output_router_logits` and so with its own load-balancing loss, once for each of its
  experts implementations that the device runs; `grouped_mm` is its default;

and a Llama whose FFN is 2 × 1408 wide, so that a token meets as many FFN weights as in the mixture. The contenders take
turns, each round from the next one on; a round is `--steps` steps after one that is not counted. Medians over all
steps.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    __version__,
)
from transformers.utils import logging

from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.phase_run import run_phase

LAYERS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 4, 512, 1408, 8, 2, 4096
OURS, DENSE = "dense2moe", "dense, same active FFN"
LEAST_AGAINST_TRANSFORMERS, LEAST_AGAINST_DENSE = 1.0, 0.7
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


class Stopwatch(TrainerCallback):
    """The seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the end of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first."""
        return [later - earlier for earlier, later in pairwise(self.ends)]


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Blocks of token ids, which are the labels too."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def run_ours(model: PreTrainedModel, blocks: torch.Tensor, batch: int, bfloat16: bool) -> list[float]:
    steps, watch = len(blocks) // batch, Stopwatch()
    settings = FinetuneConfig(
        steps=steps, batch_size=batch, warmup_steps=0, eval_steps=steps, precision="bfloat16" if bfloat16 else "float32"
    )
    domains = torch.zeros(len(blocks), dtype=torch.int64)
    phase = Phase(
        OURS,
        0,
        settings,
        Examples.of_blocks(blocks, domains),
        Examples.of_blocks(blocks[:1], domains[:1]),
        1,
        0,
        steps,
        tuple(range(LAYERS)),
        settings.precision,
        0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        run_phase(model, None, phase, Path(scratch), watch.on_step_end)
    return watch.seconds


def run_transformers(model: PreTrainedModel, blocks: torch.Tensor, batch: int, bfloat16: bool) -> list[float]:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=len(blocks) // batch,
            per_device_train_batch_size=batch,
            learning_rate=3e-4,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            bf16=bfloat16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            logging_steps=1,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Blocks(blocks), callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.seconds


def contenders() -> dict[str, Callable[[torch.Tensor, int, bool], list[float]]]:
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(
        MixtralConfig(
            intermediate_size=INTERMEDIATE,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            sliding_window=None,
            output_router_logits=True,
            **SHAPE,
        )
    )
    dense = LlamaForCausalLM(LlamaConfig(intermediate_size=TOP_K * INTERMEDIATE, **SHAPE))

    def transformers(experts: str) -> Callable[[torch.Tensor, int, bool], list[float]]:
        def run(blocks: torch.Tensor, batch: int, bfloat16: bool) -> list[float]:
            mixture.set_experts_implementation(experts)
            return run_transformers(mixture, blocks, batch, bfloat16)

        return run

    return {
        OURS: lambda *arguments: run_ours(mixture, *arguments),
        "transformers, grouped_mm": transformers("grouped_mm"),
        "transformers, eager": transformers("eager"),
        DENSE: lambda *arguments: run_transformers(dense, *arguments),
    }


def race(arguments: argparse.Namespace, bfloat16: bool) -> dict[str, list[float]]:
    entries = contenders()
    names = list(entries)
    blocks = torch.randint(
        VOCABULARY,
        ((arguments.steps + 1) * arguments.batch, arguments.length),
        generator=torch.Generator().manual_seed(0),
    )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name] += entries[name](blocks, arguments.batch, bfloat16)
            print(
                f"round {number + 1} of {arguments.rounds}, {name}: {statistics.median(seconds[name]):.2f} s a step",
                file=sys.stderr,
            )
    return seconds


def print_table(seconds: dict[str, list[float]], tokens: int, precision: str) -> None:
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{precision}\n\n| contender | seconds a step, median (min–max) | tokens a second | dense2moe against it |")
    print("|---|--:|--:|--:|")
    for name, found in seconds.items():
        spread = f"{medians[name]:.3f} ({min(found):.3f}–{max(found):.3f})"
        print(f"| {name} | {spread} | {tokens / medians[name]:,.0f} | {medians[name] / medians[OURS]:.2f}× |")
    fastest = min(medians[name] for name in medians if name.startswith("transformers"))
    for what, ratio, least in (
        ("the faster of transformers' steps", fastest / medians[OURS], LEAST_AGAINST_TRANSFORMERS),
        ("the dense model", medians[DENSE] / medians[OURS], LEAST_AGAINST_DENSE),
    ):
        print(
            f"- tokens a second against {what}: {ratio:.2f}×, at least {least:.2f}×: "
            f"{'met' if ratio >= least else 'MISSED'}"
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )
    print(
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {__version__};"
    )
    print(
        f"{arguments.batch} blocks of {arguments.length} tokens a step, {arguments.rounds} rounds of "
        f"{arguments.steps} steps\n"
    )
    for bfloat16 in (False, True):
        name = "bfloat16 autocast" if bfloat16 else "float32"
        print_table(race(arguments, bfloat16), arguments.batch * arguments.length, name)


if __name__ == "__main__":
    main()
