"""What is written is read alike by transformers 4.57, in an environment of its own, and by transformers 5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.config_files import complete_config, complete_tokenizer, old_fields
from dense2moe.upcycle.checkpoints.loaded import load_model

MakeDense = Callable[..., Path]
PYTHON = "DENSE2MOE_TRANSFORMERS_4_PYTHON"
RECIPE = "python3.11 -m venv transformers4 && transformers4/bin/pip install transformers==4.57.6 torch==2.13.0"
TEXT = "Licensed under the Apache License"
NUM_TOKENS = 150  # beyond what the scalings below were pretrained on, and beyond the window

# Logits of each directory to a file, and how it reads the text: one process for all, since importing takes longer than
# the models.
SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(150)[None] % 290
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if wrong:
        raise SystemExit(f"{directory}: {wrong}")
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, directory + "/logits.pt")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    print(json.dumps(tokenizer(sys.argv[1])["input_ids"]))
"""

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 123456.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 2e4,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + n / 4 for n in range(4)],
        "long_factor": [2.0 + n for n in range(4)],
    },
}
# Every native decoder target, by the dense class that leads there, its own fields, and settings.
TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {}),
    "mixtral with a window": ({"architecture": "MistralForCausalLM", "sliding_window": 40}, {}),
    "mixtral of Phi-3": ({"architecture": "Phi3ForCausalLM", "original_max_position_embeddings": 64}, {}),
    "mixtral of Gemma": ({"architecture": "GemmaForCausalLM", "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}, {}),
    "qwen2_moe": ({"architecture": "Qwen2ForCausalLM"}, {"layers": (1,)}),
    "qwen2_moe with a window": (
        {"architecture": "MistralForCausalLM", "sliding_window": 40},
        {"shared_expert": "half"},
    ),
    "qwen3_moe": ({"architecture": "Qwen3ForCausalLM", "head_dim": 16}, {"layers": "every-2"}),
    "granitemoe": ({"attention_bias": True}, {}),
    "granitemoeshared": (
        {"architecture": "GraniteForCausalLM", "embedding_multiplier": 3.0},
        {"shared_expert": "half"},
    ),
    "flex_olmo": ({"architecture": "Olmo2ForCausalLM"}, {}),
    "glm4_moe": ({"tie_word_embeddings": False}, {"target": "glm4_moe", "layers": (1,), "shared_expert": "half"}),
}
CASES = {
    f"{name}, {rope}": (name, rope)
    for name in TARGETS
    for rope in (ROPES if name in ("mixtral", "glm4_moe") else ("theta", "llama3"))
}
CASES["mixtral of Phi-3, longrope"] = ("mixtral of Phi-3", "longrope")
CASES.pop("mixtral of Phi-3, llama3")  # which Phi-3 has not


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(name: str, rope: str, make_dense: MakeDense, output: Path) -> Path:
    fields, settings = TARGETS[name]
    dense = make_dense(**fields, rope_parameters=dict(ROPES[rope]))
    output.mkdir()
    experts, router = ExpertsConfig(noise=0.5), RouterConfig(logit_std=2.0)
    upcycle(
        dense,
        output,
        UpcycleConfig(num_experts=4, num_experts_per_tok=2, experts=experts, router=router, **settings),
        0,
        silent,
    )
    assert json.loads((output / "config.json").read_text())["model_type"] == name.split()[0]
    return output


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    return load_model(directory, torch.float32)(torch.arange(NUM_TOKENS)[None] % 290).logits


def run_transformers_4(directories: list[Path]) -> list[list[int]]:
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"{PYTHON} is not set; make an environment by `{RECIPE}` and set it to that one's python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [python, "-c", SCRIPT, TEXT, *map(str, directories)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.fixture(scope="module")
def mixtures(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {case: make_mixture(*CASES[case], make_dense, folder / str(number)) for number, case in enumerate(CASES)}


@pytest.mark.transformers4
def test_transformers_4_gives_the_logits_of_transformers_5_for_every_target_and_scaling(
    mixtures: dict[str, Path],
) -> None:
    tokens = run_transformers_4(list(mixtures.values()))
    errors = {}
    for case, directory in mixtures.items():
        found, expected = torch.load(directory / "logits.pt"), logits(directory)
        errors[case] = float((found - expected).abs().max() / expected.abs().max())
    assert all(error <= 1e-5 for error in errors.values()), errors  # sums in another order; measured: 2e-6
    for case, found in zip(mixtures, tokens, strict=True):
        assert found == AutoTokenizer.from_pretrained(mixtures[case])(TEXT)["input_ids"]


@pytest.mark.transformers4
def test_transformers_4_reads_twins_and_packages_as_transformers_5_does(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    twins = []
    for case in ("qwen3_moe, llama3", "mixtral with a window, theta"):
        twin, package = tmp_path / case / "twin", tmp_path / case / "package"
        for path in (twin, package):
            path.mkdir(parents=True)
        quantize_checkpoint(mixtures[case], twin, "int8", QuantizeConfig(method="search", block_size=16), silent)
        write_package(twin, package, OnnxConfig(activation_bits=32, lowering="grouped"), silent)
        shutil.copyfile(package / "config.json", twin / "config.json")  # the package has no weights that torch reads
        twins.append(twin)
    run_transformers_4(twins)
    for twin in twins:
        expected = logits(twin)
        assert float((torch.load(twin / "logits.pt") - expected).abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.transformers4
def test_transformers_4_reads_dense_controls_as_transformers_5_does(make_dense: MakeDense) -> None:
    long = {"original_max_position_embeddings": 64, "rope_parameters": ROPES["longrope"]}
    controls = [
        make_dense(rope_parameters=dict(ROPES["llama3"])),
        make_dense(architecture="MistralForCausalLM", sliding_window=40, rope_parameters=dict(ROPES["theta"])),
        make_dense(architecture="Phi3ForCausalLM", **long),
        *(
            make_dense(architecture=f"{name}ForCausalLM", rope_parameters=dict(ROPES["yarn"]))
            for name in ("Qwen2", "Qwen3", "Granite")
        ),
        make_dense(architecture="Olmo2ForCausalLM", rope_parameters=dict(ROPES["linear"])),
        make_dense(architecture="GemmaForCausalLM", head_dim=16, rope_parameters=dict(ROPES["theta"])),
    ]
    for control in controls:
        complete_config(control)
        complete_tokenizer(control)
    run_transformers_4(controls)
    for control in controls:
        expected = logits(control)
        assert float((torch.load(control / "logits.pt") - expected).abs().max() / expected.abs().max()) <= 1e-5, control


# Without that environment


def test_transformers_5_reads_the_same_with_the_old_names_and_without(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    for case, directory in mixtures.items():
        values = json.loads((directory / "config.json").read_text())
        old = old_fields(values)
        assert {"rope_theta", "rope_scaling", "torch_dtype"} <= old.keys() <= values.keys()
        (tmp_path / "config.json").write_text(
            json.dumps({name: value for name, value in values.items() if name not in old})
        )
        with_old, without = (AutoConfig.from_pretrained(path).to_dict() for path in (directory, tmp_path))
        # the latter is a field beside its place in rope_parameters
        beside = {
            "_name_or_path",
            "original_max_position_embeddings",
        }
        for values in (with_old, without):
            values.update(dict.fromkeys(beside))
        assert with_old == without, case
        assert with_old["rope_parameters"] == without["rope_parameters"]


def test_old_names_are_spelled_out() -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0, "partial_rotary_factor": 0.5}
    assert old_fields(
        {"model_type": "qwen3_moe", "num_local_experts": 4, "dtype": "bfloat16", "rope_parameters": rope}
    ) == {
        "num_experts": 4,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert old_fields({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}) == {
        "rope_theta": 1e4,
        "rope_scaling": None,
    }
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert old_fields({"model_type": "gemma3_text", "rope_parameters": nested}) == {}
    assert old_fields({"model_type": "t5"}) == {}


def test_a_tokenizer_that_transformers_5_saved_is_told_in_the_words_of_transformers_4(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense_checkpoint / name, tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["tokenizer_class"], saved["extra_special_tokens"]) == ("TokenizersBackend", ["<one>", "<two>"])
    complete_tokenizer(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told == {
        **{name: value for name, value in saved.items() if name != "extra_special_tokens"},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<one>", "<two>"],
    }
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again("<one> a<two>")["input_ids"] == tokenizer("<one> a<two>")["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"tokenizer_class": "LlamaTokenizerFast", "extra_special_tokens": {"a": "<a>"}}', None]
)
def test_any_other_tokenizer_stays_what_it_is(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    if text is not None:
        path.write_text(text)
    complete_tokenizer(tmp_path)
    assert (path.read_text() if path.exists() else None) == text


def test_this_environment_has_transformers_5() -> None:
    assert transformers.__version__.startswith("5.")
