"""Right inputs of every kind, tiny and made here, and the commands that read them.

The campaign mutates copies of these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from tests.foreign import make_checkpoint
from tests.programs import dense2moe
from tests.robustness.files import Change
from tests.robustness.formats import JSON, JSON_LINES, TEXT, YAML
from tests.robustness.graphs import MODEL
from tests.robustness.mutations import Table, tabulate
from tests.robustness.tensors import SAFETENSORS

Kind = Literal[
    "recipes",
    "checkpoints",
    "sharded checkpoints",
    "references",
    "packages",
    "int8 packages",
    "texts",
    "tasks",
    "prompts",
    "runs",
]
Command = tuple[str, ...]
"""Arguments of the command line.

`{input}` is the mutated copy, `{work}` the one place where something may be written.
"""

_RECIPE = {
    "source": "checkpoint",
    "data": {
        "source": {"kind": "text", "train": ["text.txt"], "separator": "\n\n"},
        "block_size": 32,
        "max_train_tokens": 640,
        "max_validation_tokens": 128,
        "max_test_tokens": 128,
    },
    "upcycle": {"num_experts": 4},
    "finetune": {
        "steps": 2,
        "batch_size": 2,
        "eval_steps": 2,
        "warmup_steps": 1,
        "control": False,
        "precision": "float32",
    },
    "variants": ["float32"],
    "parity": {"free_tokens": 4, "decode_steps": 4, "num_blocks": 2, "tasks": ["tasks.jsonl"]},
}
_LONG_RECIPE = """\
# Nearly every key that a recipe can have.
name: tiny
seed: 3
source: {path: checkpoint}
data:
  source:
    kind: domains
    domains:
      prose: {kind: text, train: [text.txt], separator: "\\n\\n"}
      other:
        kind: text
        train: [text.txt, "t*.txt"]
        validation: [held.txt]
        separator: "\\n\\n"
  block_size: 32
  max_train_tokens: 640
  max_validation_tokens: 128
  max_test_tokens: 128
upcycle:
  target: auto
  num_experts: 4
  num_experts_per_tok: 2
  layers: all
  shared_expert: none
  experts: {kind: copies, noise: 0.01}
  router:
    kind: prototypes
    domains:
      - {prompts: ["Once upon a time", "[/INST]"]}
      - {files: [text.txt]}
      - prompts: ["x"]
      - prompts: ["y"]
    max_tokens: 64
  receipt: whole
  shard_bytes: 1000000
finetune:
  train: router
  stages:
    - {train: experts, steps: 2, routing: by-domain, schedule: cosine}
    - {train: all, learning_rate: 1e-4, warmup_steps: 0}
  steps: 2
  batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 3e-4
  weight_decay: 0.0
  max_grad_norm: 1.0
  z_coefficient: 0.001
  distillation: {weight: 0.5, temperature: 2.0}
  expert_dropout: 0.1
  eval_steps: 1
  warmup_steps: 1
  precision: float32
  control: false
variants: [float32, int8, mixed]
quantize:
  method: round
  calibration_tokens: 64
  input_scaling: none
  block_size: 32
  attention_bits: 8
  overrides: [{tensors: experts, layers: [0], bits: 8}]
  budget: 200 kB
export: {device: cpu, lowering: grouped, request: {prompt_tokens: 16, new_tokens: 4}, activation_bits: 8}
parity:
  max_relative_error: 1e-4
  left_padding: true
  longest_row: 64
  max_perplexity_increase: {float32: 0.01, int8: 0.5, mixed: 1.0}
  tasks: [tasks.jsonl]
  num_examples: 2
  decode_steps: 4
"""
_EXAMPLES = (
    {"prompt": "The owner of the house", "choices": [" came in.", " went away."], "answer": " came in."},
    {"prompt": "The garden", "choices": [" had doors.", " had a wall."], "answer": 1},
    {"prompt": "A door", "choices": ["!", "?"], "answer": 0},
)


@dataclass(frozen=True)
class Input:
    """A folder that is right, what can be done to its files, and commands that read them, each by its name."""

    folder: Path
    table: Table
    commands: Mapping[str, Command]


class Inputs:
    """All kinds of input, each made when it is first asked for, below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path] = {}

    def of(self, kind: Kind) -> Input:
        """The input of a kind."""
        write, folder_name, files, commands = _KINDS[kind]
        folder = self._make(kind, lambda folder: write(self, folder))
        if kind == "runs":
            files = {
                path.relative_to(folder).as_posix(): JSON
                for path in sorted((folder / "work").rglob("*.json"))
                if path.name in _RUN_FILES
            }
        return Input(folder, tabulate(files, folder_name), commands)

    def _make(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder of this name, written once."""
        if name not in self._found:
            folder = self._folder / name
            folder.mkdir(parents=True)
            write(folder)
            self._found[name] = folder
        return self._found[name]

    def dense(self) -> Path:
        """A tiny Llama."""
        return self._make("dense", _save_checkpoint)

    def mixture(self) -> Path:
        """The mixture made of it, of experts that differ."""
        config = UpcycleConfig(
            num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=1.0)
        )
        return self._make("mixture", lambda folder: _discard(upcycle(self.dense(), folder, config, 0, _silent)))

    def package(self, variant: Variant) -> Path:
        """The mixture in ONNX."""

        def write(folder: Path) -> None:
            (folder / "twin").mkdir()
            (folder / "package").mkdir()
            quantize_checkpoint(self.mixture(), folder / "twin", variant, QuantizeConfig(method="round"), _silent)
            write_package(folder / "twin", folder / "package", OnnxConfig(lowering="fused"), _silent)

        return self._make(f"exported {variant}", write) / "package"


# Folders of each kind.


def _write_recipe(inputs: Inputs, folder: Path) -> None:
    shutil.copytree(inputs.dense(), folder / "checkpoint")
    _write_text(folder / "text.txt")
    _write_text(folder / "held.txt", start=1000)
    _write_examples(folder / "tasks.jsonl")
    (folder / "recipe.yaml").write_text(_LONG_RECIPE, encoding="utf-8")


def _write_checkpoint(inputs: Inputs, folder: Path) -> None:
    shutil.copytree(inputs.dense(), folder / "checkpoint")
    _write_text(folder / "text.txt")
    _write_examples(folder / "tasks.jsonl")
    (folder / "recipe.json").write_text(json.dumps(_RECIPE), encoding="utf-8")


def _write_sharded(inputs: Inputs, folder: Path) -> None:
    _write_checkpoint(inputs, folder)
    shutil.rmtree(folder / "checkpoint")
    shutil.copytree(inputs.dense(), folder / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(inputs.dense()).save_pretrained(folder / "checkpoint", max_shard_size="120KB")


def _write_package(inputs: Inputs, folder: Path) -> None:
    shutil.copytree(inputs.package("float32"), folder / "package")
    shutil.copytree(inputs.mixture(), folder / "reference")
    _write_text(folder / "text.txt")


def _write_int8(inputs: Inputs, folder: Path) -> None:
    shutil.copytree(inputs.package("int8"), folder / "package")


def _write_data(inputs: Inputs, folder: Path) -> None:
    _write_checkpoint(inputs, folder)
    _write_package(inputs, folder)
    (folder / "prompts.txt").write_text("Once upon a time\nThe owner\n", encoding="utf-8")


def _write_run(inputs: Inputs, folder: Path) -> None:
    _write_checkpoint(inputs, folder / "of")
    result = dense2moe("run", folder / "of" / "recipe.json", "--workdir", folder / "work")
    assert result.exit_code == 0, result.output
    shutil.copytree(folder / "work", folder / "other", symlinks=True)


# Commands.

_CHECK = {"check": ("check", "{input}/recipe.json")}
_RUN = ("run", "{input}/recipe.json", "--workdir", "{work}", "--until")
_PARITY = (
    "parity",
    "{input}/package",
    "--reference",
    "{input}/reference",
    "--data",
    "{input}/text.txt",
    "--block-size",
    "16",
    "--blocks",
    "2",
)
_TASK = ("--task", "{input}/tasks.jsonl")
_GENERATE = {"generate": ("generate", "{input}/package", "--prompt", "Once upon a time", "--max-new-tokens", "4")}
_PROMPTS = {"generate": ("generate", "{input}/package", "--prompts", "{input}/prompts.txt", "--max-new-tokens", "2")}
_BENCH = {"bench": ("bench", "{input}/package", "--batch", "1", "--prompt", "4", "--new", "2", "--rounds", "1")}
_CHECKPOINT = {"check": ("check", "{input}/recipe.json"), "run": (*_RUN, "upcycle")}
_RUNS = {
    "show": ("show", "{input}/work"),
    "verify": ("verify", "{input}/work"),
    "compare": ("compare", "{input}/other", "{input}/work", "--html", "{work}/comparison.html"),
    "generate": ("generate", "{input}/work", "--prompt", "The owner", "--max-new-tokens", "2"),
    "package": ("package", "{input}/work", "{work}/package"),
}
_RECIPES = {"check": ("check", "{input}/recipe.yaml"), "plan": ("plan", "{input}/recipe.yaml", "--workdir", "{work}")}


# Files that are mutated.

Files = Mapping[str, Mapping[str, Change]]


def _below(folder: str, files: Files) -> Files:
    return {f"{folder}/{file}": changes for file, changes in files.items()}


_COMPANIONS = {
    "config.json": JSON,
    "generation_config.json": JSON,
    "tokenizer.json": JSON,
    "tokenizer_config.json": JSON,
}
_WHOLE = _COMPANIONS | {"model.safetensors": SAFETENSORS}
_SHARDS = {"model.safetensors.index.json": JSON} | {f"model-0000{n}-of-00002.safetensors": SAFETENSORS for n in (1, 2)}
_PACKAGE = {"model.onnx": MODEL, "model.onnx_data": {}, "genai_config.json": JSON} | _COMPANIONS
_RUN_FILES = ("run.json", "manifest.json", "report.json")

_KINDS: dict[Kind, tuple[Callable[[Inputs, Path], None], str | None, Files, Mapping[str, Command]]] = {
    "recipes": (_write_recipe, None, {"recipe.yaml": YAML}, _RECIPES),
    "checkpoints": (_write_checkpoint, "checkpoint", _below("checkpoint", _WHOLE), _CHECKPOINT),
    "sharded checkpoints": (_write_sharded, "checkpoint", _below("checkpoint", _SHARDS), _CHECKPOINT),
    "references": (_write_package, "reference", _below("reference", _WHOLE), {"parity": _PARITY}),
    "packages": (
        _write_package,
        "package",
        _below("package", _PACKAGE),
        _GENERATE | _BENCH | {"parity": (*_PARITY, "--json", "{work}/parity.json")},
    ),
    "int8 packages": (
        _write_int8,
        None,
        _below("package", {"model.onnx": MODEL, "model.onnx_data": {}}),
        _GENERATE | _BENCH,
    ),
    "texts": (_write_data, None, {"text.txt": TEXT}, _CHECK | {"run": (*_RUN, "data"), "parity": _PARITY}),
    "tasks": (_write_data, None, {"tasks.jsonl": TEXT | JSON_LINES}, _CHECK | {"parity": (*_PARITY, *_TASK)}),
    "prompts": (_write_data, None, {"prompts.txt": TEXT}, _PROMPTS),
    "runs": (_write_run, None, {}, _RUNS),
}


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _discard(_: object) -> None:
    """What was made is in its folder."""


def _save_checkpoint(folder: Path) -> None:
    vocabulary = {
        token: number for number, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    make_checkpoint("llama", folder, tokenizer=fast, vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64)


def _write_text(path: Path, start: int = 0) -> None:
    words = ("owner", "keeper", "friend")
    lines = [
        f"In year {n} the {words[n % 3]} of house {n % 7} had {n * 3} doors and a garden."
        for n in range(start, start + 90)
    ]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _write_examples(path: Path) -> None:
    path.write_text("".join(f"{json.dumps(example)}\n" for example in _EXAMPLES), encoding="utf-8")
