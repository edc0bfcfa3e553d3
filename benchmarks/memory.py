"""Peak memory of every stage and of every way to train, each in a fresh process, beside what `dense2moe plan` says.

    python benchmarks/memory.py MODEL TEXT [--train all,router,lora] [--until finetune] [--blocks 8] [--batch 4]
        [--random]

MODEL is a checkpoint of a decoder, TEXT a text file in UTF-8. With `--random` only its config and tokenizer are read,
and its weights are drawn: the shape of a model that is not at hand. Prints a row for each stage: seconds, peak resident
memory, what was planned, and their ratio.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.report.costs import cost_table, read_costs, take_costs

RECIPE = """\
source: {source}
data:
  source: {{kind: text, train: [{folder}/train.txt], validation: [{folder}/validation.txt], test: [{folder}/test.txt]}}
  block_size: 256
  max_train_tokens: 65536
  max_validation_tokens: {tokens}
  max_test_tokens: {tokens}
upcycle: {{num_experts: 4, num_experts_per_tok: 2}}
finetune:
  {{train: {train}, steps: 2, warmup_steps: 1, eval_steps: 1, batch_size: {batch}, learning_rate: 2.0e-5,
    control: false}}
variants: [int8, int4]
"""


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--train",
    "trains",
    default="all,router,experts,last-2,lora,prompt",
    show_default=True,
    help="Ways to train, divided by commas.",
)
@click.option(
    "--until",
    default="finetune",
    show_default=True,
    help="Last stage; the ones after fine-tuning are run for the first of --train.",
)
@click.option("--blocks", default=8, show_default=True, help="Held-out blocks of 256 tokens.")
@click.option("--batch", default=4, show_default=True, help="Blocks a step.")
@click.option("--random", "is_random", is_flag=True, help="Draw weights in bfloat16 for MODEL's config.")
def main(model: Path, text: Path, trains: str, until: str, blocks: int, batch: int, is_random: bool) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        source = model.absolute()
        if is_random:  # in a process of its own: those begun after it would inherit the most memory that it had
            source = Path(folder) / "model"
            drawing = multiprocessing.get_context("spawn").Process(target=draw, args=(model, source))
            drawing.start()
            drawing.join()
        split(text, Path(folder))
        for number, train in enumerate(trains.split(",")):
            recipe, workdir = Path(folder) / "memory.yaml", Path(folder) / "run"
            recipe.write_text(
                RECIPE.format(source=source, folder=folder, train=train, tokens=256 * blocks, batch=batch),
                encoding="utf-8",
            )
            last = "finetune" if number or train == "prompt" else until
            command = [
                sys.executable,
                "-m",
                "dense2moe",
                "run",
                str(recipe),
                "--workdir",
                str(workdir),
                "--until",
                last,
            ]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            if not (workdir / "run.json").is_file():
                raise SystemExit(finished.stderr.strip().splitlines()[-1])
            state = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
            facts = {label: open_artifact(workdir / name).facts for label, name in state["artifacts"].items()}
            costs = take_costs(facts)[1]
            shown = costs if number == 0 else {label: cost for label, cost in costs.items() if label == "finetune"}
            Console(width=100).print(f"train: {train}", cost_table(read_costs(shown)))
            if finished.returncode:
                print(finished.stderr.strip().splitlines()[-1])
            for made in workdir.glob("finetune-*"):
                if number:
                    shutil.rmtree(made)


def split(text: Path, folder: Path) -> None:
    """Write the lines of a text into three files, one for each split of the data."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, name in enumerate(("train", "validation", "test")):
        (folder / f"{name}.txt").write_text(
            "".join(lines[number * len(lines) // 3 : (number + 1) * len(lines) // 3]), encoding="utf-8"
        )


def draw(model: Path, output: Path) -> None:
    """Write a checkpoint with a model's config and tokenizer, and normally distributed weights in bfloat16."""
    config = AutoConfig.from_pretrained(model)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(output)
    for file in model.glob("*token*"):
        shutil.copyfile(file, output / file.name)


if __name__ == "__main__":
    main()
