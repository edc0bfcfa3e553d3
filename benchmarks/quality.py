"""What experts buy at equal tokens: held-out loss of mixtures and of the dense model continued.

    python benchmarks/quality.py [--text DIRECTORY] [--cache DIRECTORY]

Each dense model becomes mixtures of 4 experts (granular: 8 halves) of which every token visits 2 (4 halves), made in
every way that the recipes know. All are trained on the same blocks in the same order with the same rates, and so is the
dense model itself, the control, with and without distillation. Three seeds draw the order, the routers and what is
random in the experts. The loss is of the weights with the best validation loss, on text that neither training nor the
choice of weights has seen.

Two settings:

- embedded: `recipes/models/python-docs-4m`, on the text that it has learned from.
- wikitext: a Llama of 1.1 M parameters with a vocabulary of 2048, which this script trains once on WikiText-2
  (`--text`: a directory with `train.txt`, `valid.txt` and `test.txt`; without it the setting is left out).

Every result is kept in the cache as it comes, so a killed benchmark goes on where it was. About an hour for both on 2
cores, side by side with `--setting` and one thread each.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import DataConfig, PythonDocsData, TextData
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN, next_token_loss
from dense2moe.upcycle.training.config import Distillation, FinetuneConfig
from dense2moe.upcycle.training.evaluation import held_out_loss
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model
from dense2moe.upcycle.training.order import draw_order

ROOT = Path(__file__).resolve().parent.parent
CONTROL, DISTILLED_CONTROL = "dense, continued", "dense, continued, distilled"


@dataclass(frozen=True)
class Way:
    """One way to make the mixture and to train it."""

    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    num_experts: int = 4
    distillation: Distillation | None = None


WAYS = {
    DISTILLED_CONTROL: Way(distillation=Distillation(weight=0.5)),  # what distillation does without experts
    "copies": Way(),
    "noise 0.1": Way(ExpertsConfig(noise=0.1)),
    "drop 0.25": Way(ExpertsConfig(drop=0.25)),
    "drop 0.5": Way(ExpertsConfig(drop=0.5)),
    "granular": Way(ExpertsConfig(kind="granular", granularity=2), num_experts=8),
    "copies, distilled": Way(distillation=Distillation(weight=0.5)),
}


@dataclass(frozen=True)
class Pretraining:
    """Sizes of the Llama and of its tokenizer, and how it is trained; a step is 16 blocks."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    steps: int = 1500
    autocast: bool = False  # products in bfloat16


@dataclass(frozen=True)
class Setting:
    """A dense model, its text, and how long and fast all are trained."""

    dense: Path
    data: DataConfig
    finetune: FinetuneConfig


def quiet(what: str, done: int, total: int) -> None:
    pass


def embedded_setting() -> Setting:
    data = DataConfig(
        source=PythonDocsData(kind="python-docs"), block_size=256, max_validation_tokens=16_384, max_test_tokens=32_768
    )
    return Setting(ROOT / "recipes/models/python-docs-4m", data, settings(60, 8, 5e-5))


def wikitext_setting(text: Path, cache: Path) -> Setting:
    data = wikitext_data(text)
    return Setting(wikitext_dense(text, cache / "wikitext-dense", Pretraining()), data, settings(300, 16, 1e-3))


def wikitext_data(text: Path) -> DataConfig:
    source = TextData(
        kind="text",
        train=(str(text / "train.txt"),),
        validation=(str(text / "valid.txt"),),
        test=(str(text / "test.txt"),),
    )
    return DataConfig(source=source, block_size=128, max_validation_tokens=16_384, max_test_tokens=65_536)


def wikitext_dense(text: Path, dense: Path, pretraining: Pretraining) -> Path:
    """The directory `dense`, with the dense model that is trained on WikiText-2 unless it is there."""
    if not dense.is_dir():
        fresh = dense.with_name(f"{dense.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        pretrain(text / "train.txt", wikitext_data(text), fresh, pretraining)
        fresh.rename(dense)
    return dense


def settings(steps: int, batch_size: int, rate: float) -> FinetuneConfig:
    return FinetuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        router_learning_rate=rate,
        warmup_steps=20,
        domain_coefficient=0.0,  # a balance loss instead, with a random router
        eval_steps=50,
        patience=99,
    )


def pretrain(
    train: Path, data: DataConfig, output: Path, how: Pretraining, batch_size: int = 16, rate: float = 2e-3
) -> None:
    """A byte-level BPE and a Llama, both from WikiText-2's training text alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=how.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(train)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=how.vocab_size,
            hidden_size=how.hidden_size,
            intermediate_size=how.intermediate_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        prepare_data(Path(name), Path(name), data, ROOT, quiet)
        blocks = read_blocks(Path(name), "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step, places in enumerate(
        torch.tensor(list(draw_order(len(blocks), how.steps * batch_size, 0))).split(batch_size)
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 0.05 + 0.95 * (1 + math.cos(math.pi * step / how.steps)) / 2)
        batch = blocks[places]
        with torch.autocast("cpu", torch.bfloat16, enabled=how.autocast):
            logits = model(input_ids=batch).logits
        loss = next_token_loss(logits.float(), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"pretraining step {step}: {loss.item():.3f}", file=sys.stderr)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def measure(setting: Setting, data: Path, name: str, seed: int) -> dict[str, Any]:
    """Train one model and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        mixture, output, scratch = (Path(folder) / part for part in ("mixture", "output", "scratch"))
        mixture.mkdir()
        way = WAYS.get(name, Way())
        config = UpcycleConfig(
            num_experts=way.num_experts,
            num_experts_per_tok=way.num_experts // 2,
            experts=way.experts,
            router=RouterConfig(logit_std=1.0),
        )
        upcycle(setting.dense, mixture, config, seed, quiet)
        source = setting.dense if name in (CONTROL, DISTILLED_CONTROL) else mixture
        test = read_blocks(data, "test")
        before = held_out_loss(load_model(source, torch.float32), test)
        stages = setting.finetune.model_copy(update={"distillation": way.distillation}).resolve_phases()
        teacher = setting.dense if way.distillation else None
        started = time.perf_counter()
        setup = Setup(sparse_layers(load_shape(mixture, NEXT_TOKEN)), data, scratch, "float32", seed)
        trained = train_model(Job("fine-tuned", source, output, stages), setup, teacher, quiet)
        model = load_model(output, torch.float32)
        return {
            "before": before,
            "loss": held_out_loss(model, test),
            "parameters": sum(p.numel() for p in model.parameters()),
            "best_step": trained.best_step,
            "seconds": time.perf_counter() - started,
            "validation": [
                (step.num_tokens, step.validation_loss) for step in trained.history if step.validation_loss is not None
            ],
        }


def digest(*settings: object) -> str:
    """What a cached result was made with."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def run_setting(name: str, setting: Setting, seeds: int, cache: Path) -> dict[str, list[dict[str, Any]]]:
    data = cache / f"{name}-data-{digest(setting.data)}"
    if not (data / "data.json").is_file():
        data.mkdir(exist_ok=True)
        prepare_data(setting.dense, data, setting.data, ROOT, quiet)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for way in (CONTROL, *WAYS):
            path = cache / f"{name} {way} {seed} {digest(setting.data, setting.finetune, WAYS.get(way))}.json"
            if not path.is_file():
                fresh = path.with_suffix(".partial")
                fresh.write_text(json.dumps(measure(setting, data, way, seed)), encoding="utf-8")
                fresh.rename(path)
            result = json.loads(path.read_text(encoding="utf-8"))
            print(f"{name}, seed {seed}, {way}: {result['loss']:.4f} ({result['seconds']:.0f} s)", file=sys.stderr)
            results.setdefault(way, []).append(result)
    return results


def print_table(name: str, setting: Setting, results: dict[str, list[dict[str, Any]]]) -> None:
    tuned = setting.finetune
    tokens = tuned.steps * tuned.batch_size * setting.data.block_size
    print(
        f"{name}: {tuned.steps} steps of {tuned.batch_size} blocks of {setting.data.block_size}, {tokens / 1e6:.2f} "
        "M tokens; ",
        end="",
    )
    print(
        f"peak rate {tuned.learning_rate:g}; {len(results[CONTROL])} seeds; before training "
        f"{results[CONTROL][0]['before']:.4f}\n"
    )
    print("| model | parameters | before | held-out loss, mean (min–max) | against the control, mean (min–max) |")
    print("|---|--:|--:|--:|--:|")
    control = [result["loss"] for result in results[CONTROL]]
    for way, found in results.items():
        losses = [result["loss"] for result in found]
        gains = [loss - other for loss, other in zip(losses, control, strict=True)]
        against = "" if way == CONTROL else f"{statistics.mean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})"
        before = statistics.mean(result["before"] for result in found)
        spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f}–{max(losses):.4f})"
        print(f"| {way} | {found[0]['parameters'] / 1e6:.2f} M | {before:.4f} | {spread} | {against} |")
    means = {
        way: statistics.mean(r["loss"] for r in found)
        for way, found in results.items()
        if way not in (CONTROL, DISTILLED_CONTROL)
    }
    best = min(means, key=lambda way: means[way])
    beaten = max(r["loss"] for r in results[best]) < min(control)
    verdict = (
        "in every seed better than every seed of the control"
        if beaten
        else "its seeds and the control's overlap, or the control is better"
    )
    print(f"\nwinner: {best}; {verdict}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT.parent / "shared/data/wikitext-2",
        help="directory of WikiText-2 as plain text",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/quality"), help="where the pretrained model and every result are kept"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setting", choices=("embedded", "wikitext"), help="only this one")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = arguments.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    if arguments.setting != "embedded" and not (arguments.text / "train.txt").is_file():
        print(f"wikitext: left out, no train.txt in {arguments.text}; give --text", file=sys.stderr)
        arguments.setting = "embedded"
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, float32\n"
    )
    for name in ("embedded", "wikitext"):
        if arguments.setting in (None, name):
            setting = embedded_setting() if name == "embedded" else wikitext_setting(arguments.text, cache)
            print_table(name, setting, run_setting(name, setting, arguments.seeds, cache))


if __name__ == "__main__":
    main()
