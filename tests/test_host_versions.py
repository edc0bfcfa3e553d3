"""Mixtures of our own in other versions of transformers, by the source beside their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hosts import ROWS
from test_host_protocols import IDS, bert, load, logits, make_mixture
from test_hosts import PLAIN, convert, edit_config, save_dense
from test_transformers4 import PYTHON, RECIPE
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.receipt_cases import input_cases
from dense2moe.upcycle.building.receipt_text import NO_TEXT, read_text, reads_text
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.table import find_host

__all__ = ["bert"]  # a fixture


@pytest.fixture
def old_python() -> str:
    """The python of an environment with transformers 4."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"needs transformers 4 ({RECIPE}) and {PYTHON}")
    return python


def test_modules_of_other_names_are_named(bert: Path, tmp_path: Path) -> None:
    """A version of transformers that renames modules, or that is too old."""
    config = json.loads((bert / "config.json").read_text())
    site = config["mixture"]["sites"][0] | {"ffn": "encoder.layer.{layer}.feed_forward"}
    directory = tmp_path / "moe"
    directory.mkdir()
    for file in bert.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    edit_config(directory, mixture=config["mixture"] | {"sites": [site]})
    with pytest.raises(AttributeError, match=r"BertModel of transformers 5\S* has no module \S*0.feed_forward"):
        load(directory)
    edit_config(directory, mixture=config["mixture"] | {"oldest_transformers": "99.1.0"})
    with pytest.raises(ImportError, match=r"mixture_bert needs transformers 99\.1\.0 or newer; this is 5"):
        load(directory)


TRUSTING = """
import json, sys
import torch, transformers
for auto, directory in json.loads(sys.argv[1]):
    model, info = getattr(transformers, auto).from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        print(json.dumps(model.eval()(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


@pytest.mark.transformers4
def test_transformers_4_runs_the_source_beside_the_checkpoint(old_python: str, bert: Path, tmp_path: Path) -> None:
    """By its auto classes, and with the same logits."""
    gpt2 = make_mixture(tmp_path / "gpt2", "gpt2")
    asked = [("AutoModelForMaskedLM", str(bert)), ("AutoModelForCausalLM", str(gpt2))]
    masked, causal = run_python(old_python, TRUSTING, tmp_path, asked, IDS.tolist())
    expected = (logits(load(bert)), logits(AutoModelForCausalLM.from_pretrained(gpt2).eval()))
    for found, own in zip((masked, causal), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), own, rtol=1e-5, atol=1e-5)


COMPARING = """
import json, sys
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
for name, directory in json.loads(sys.argv[1]):
    given, expected = torch.load(directory + "/case.pt")
    try:
        model = get_class_from_dynamic_module("modeling_mixture." + name, directory).from_pretrained(directory)
        with torch.no_grad():
            output = model.eval()(**given)
        found = next(value for value in output.values() if isinstance(value, torch.Tensor))
        print(json.dumps(float((found - expected).abs().max() / expected.abs().max())))
    except (AttributeError, ImportError) as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.transformers4
def test_every_family_runs_in_transformers_4_or_says_what_it_needs(old_python: str, tmp_path: Path) -> None:
    """None computes anything else: names of modules and of config fields have changed since."""
    made = [make_case(tmp_path / name, name) for name in ROWS]
    told = dict(zip(ROWS, run_python(old_python, COMPARING, tmp_path, made), strict=True))
    wrong = {}
    for name, (_, directory) in zip(ROWS, made, strict=True):
        host = find_host(json.loads((Path(directory) / "config.json").read_text())["model_type"])
        assert host is not None
        if host.oldest_transformers.startswith("4."):
            held = isinstance(told[name], float) and told[name] <= 1e-5
        else:
            needs, lacks = f"needs transformers {host.oldest_transformers} or newer; this is 4.57", "has no class"
            held = needs in str(told[name]) or lacks in str(told[name])
        if not held:
            wrong[name] = told[name]
    assert not wrong


@torch.no_grad()
def make_case(directory: Path, name: str) -> tuple[str, str]:
    """A mixture, beside it an input and what it gives; returns its class and where it lies."""
    output = make_mixture(directory, name)
    model = load_model(output, torch.float32, "feature-extraction")
    text = read_text(directory / "dense", 32) if reads_text(model.config) else NO_TEXT
    called = next(input_cases(model, text, torch.float32)).run.keywords  # type: ignore[attr-defined]  # a partial
    given = called.get("given") or {"input_ids": called["ids"], "attention_mask": called["mask"]}
    expected = next(value for value in model(**given).values() if isinstance(value, torch.Tensor))
    torch.save((given, expected), output / "case.pt")
    return type(model).__name__, str(output)


LIKE = 1e-4  # measured 2e-5; a tensor or a value under another name gives more than 1e-2

SAVING = """
import json, sys
import torch, transformers
for architecture, directory in json.loads(sys.argv[1]):
    model_class = getattr(transformers, architecture, None)
    if model_class is not None:
        model = model_class(model_class.config_class.from_pretrained(directory + "/dense"))
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start alike, and a wrong name would not show
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(directory + "/old")
"""


@pytest.mark.transformers4
def test_files_that_transformers_4_saved_are_read(old_python: str, tmp_path: Path) -> None:
    """As most models of the hub are: under that version's names of tensors and config fields."""
    made = [(row.architecture, str(save_dense(tmp_path / name / "dense", name).parent)) for name, row in ROWS.items()]
    assert list(run_python(old_python, SAVING, tmp_path, made)) == []
    old = {name: tmp_path / name / "old" for name in ROWS if (tmp_path / name / "old").is_dir()}
    assert len(old) > 100
    lacks_head = old.pop("luke")
    wrong = {name: rel for name, directory in old.items() if (rel := compare_old(directory, name)) > LIKE}
    assert not wrong
    with pytest.raises(UpcycleError, match=r"lm_head\.decoder\.weight' is missing"):  # which is not tied since
        compare_old(lacks_head, "luke")


@torch.no_grad()
def compare_old(source: Path, name: str) -> float:
    """How far a mixture with a router of zeros is from the dense model, which transformers 5 reads itself."""
    plan = convert(source, source.parent / "moe", {**PLAIN, "router": {"logit_std": 0.0}})
    dense = getattr(transformers, ROWS[name].architecture).from_pretrained(source, dtype=torch.float32).eval()
    text = read_text(source, 32) if reads_text(dense.config) else NO_TEXT
    case = next(input_cases(dense, text, torch.float32))
    expected = case.run(dense)
    found = case.run(load_model(source.parent / "moe", torch.float32, plan.conversion.family.task))
    return float((found - expected).abs().max() / expected.abs().max())


def run_python(python: str, script: str, folder: Path, *arguments: Any) -> Iterator[Any]:
    """What a script prints, a JSON value a line."""
    done = subprocess.run(
        [python, "-c", script, *map(json.dumps, arguments)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (json.loads(line) for line in done.stdout.splitlines())
