"""Hosts: dense families whose FFNs a mixture of ours replaces, from surgery to loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families_page import FIGURES, check_figure, read_lines
from fine_tunes import fine_tune
from hosts import ROWS
from safetensors.torch import load_file, save_file
from shapes import each_shape
from transformers import PreTrainedModel

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints.headers import index_tensors
from dense2moe.upcycle.checkpoints.loaded import load_model, router_weights
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models import mixture
from dense2moe.upcycle.models.table import HOSTS

CASES = [(name, architecture) for name, row in ROWS.items() for architecture in (row.architecture, *row.more)]
SHAPES = {row.shape: f"{name}-{row.architecture}" for name, row in ROWS.items() if row.shape}
PLAIN = {"target": "mixture", "num_experts": 4, "num_experts_per_tok": 2}


def ignore(*_: Any) -> None:
    """Progress that nobody reads."""


def save_dense(directory: Path, name: str, architecture: str | None = None, **values: Any) -> Path:
    """A tiny dense model, with biases and norms that are not what they start as."""
    torch.manual_seed(0)
    model = ROWS[name].make(architecture, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def convert(source: Path, output: Path, settings: dict[str, Any]) -> UpcyclePlan:
    """The mixture of a dense model, compared with its plan."""
    output.mkdir()
    plan = upcycle(source, output, UpcycleConfig.model_validate(settings), 0, ignore)
    check_written(source, output, plan, 0, ignore)
    return plan


def load(directory: Path, plan: UpcyclePlan) -> PreTrainedModel:
    """The mixture by its auto class."""
    return load_model(directory, torch.float32, plan.conversion.family.task)


def test_every_host_has_a_row() -> None:
    assert {host.model_type for host in HOSTS} == {ROWS[name].make().config.model_type for name in ROWS}


def test_every_tiny_model_has_a_line_on_the_page() -> None:
    on_page = {line[:2] for line in read_lines() if line[2] == "mixture"}
    assert on_page == {(name, row.architecture) for name, row in ROWS.items()}


every_host = pytest.mark.parametrize(("name", "architecture"), each_shape(CASES, set(SHAPES.values()), name="-".join))


@every_host
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of WavLM's own
def test_the_function_is_kept(tmp_path: Path, name: str, architecture: str) -> None:
    """The receipt raises where a limit is broken: padded, other token types, other sizes, decoded with a cache."""
    source = save_dense(tmp_path / "dense", name, architecture)
    plan = convert(source, tmp_path / "moe", PLAIN)
    receipt = write_receipt(source, tmp_path / "moe", plan, 32, ignore)
    exact = [line for line in receipt.comparisons if line.router == "zero" and line.experts == "eager"]
    assert {line.dtype for line in exact} >= {"float32", "bfloat16"} - set(ROWS[name].refused)
    assert all(line.rel <= 1e-5 for line in exact if line.dtype == "float32")
    if architecture == ROWS[name].architecture:
        for dtype in sorted({line.dtype for line in exact} & set(FIGURES)):
            rel = max(line.rel for line in exact if line.dtype == dtype)
            check_figure((name, architecture, plan.conversion.target_name), dtype, rel)
    if plan.conversion.zero_router == "bitwise":
        assert all(line.bitwise for line in exact if line.dtype != "float16")
        assert all(line.bitwise or line.halves_bitwise for line in exact if line.bitwise_due)


@every_host
def test_a_saved_mixture_is_loaded_again(tmp_path: Path, name: str, architecture: str) -> None:
    """By transformers alone, under the names that transformers saves, with the layer's source beside it."""
    source = save_dense(tmp_path / "dense", name, architecture)
    plan = convert(source, tmp_path / "moe", PLAIN)
    model = load(tmp_path / "moe", plan)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", plan)
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }
    assert (tmp_path / "again" / mixture.FILE_NAME).read_bytes() == Path(mixture.__file__).read_bytes()
    assert set(index_tensors(tmp_path / "again")) == set(index_tensors(tmp_path / "moe"))


SETTINGS: list[dict[str, Any]] = [
    {"layers": [1]},
    {"experts": {"kind": "granular", "granularity": 2}, "num_experts": 8, "num_experts_per_tok": 4},
    {"experts": {"kind": "split"}, "num_experts_per_tok": 4},
    {"shared_expert": "half"},
    {"shared_expert": "zero"},
    {"experts": {"drop": 0.5}},
    {"experts": {"noise": 0.1}},
]


@pytest.mark.parametrize(
    ("name", "settings"),
    each_shape(
        [(name, settings) for name in ("bert", "gpt2") for settings in SETTINGS],
        {f"{('bert', 'gpt2')[number % 2]}-{settings}" for number, settings in enumerate(SETTINGS)},
        name=lambda case: f"{case[0]}-{case[1]}",
    ),
)
def test_settings_are_those_of_native_targets(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    source = save_dense(tmp_path / "dense", name)
    plan = convert(source, tmp_path / "moe", {**PLAIN, **settings})
    receipt = write_receipt(source, tmp_path / "moe", plan, 32, ignore)
    judged = [line for line in receipt.comparisons if line.limit is not None]
    changed = settings.get("experts", {}).keys() & {"drop", "noise"}
    assert bool(judged) != bool(changed)
    assert len(list(router_weights(load(tmp_path / "moe", plan)))) == len(settings.get("layers", range(2)))


def test_redrawn_neurons_are_the_same_in_all_matrices(tmp_path: Path) -> None:
    """Rows of the first matrix and of its bias, and columns of the second."""
    source = save_dense(tmp_path / "dense", "gpt2")
    convert(source, tmp_path / "moe", {**PLAIN, "experts": {"drop": 0.5}})
    written, dense = open_checkpoint(tmp_path / "moe"), open_checkpoint(source)
    name = "transformer.h.0.mlp"
    kept = (written.read(f"{name}.experts.up_proj") == dense.read(f"{name}.c_fc.weight").t()).all(-1)
    assert kept.sum(-1).tolist() == [kept.shape[1] // 2] * 4
    bias = written.read(f"{name}.experts.up_proj_bias") == dense.read(f"{name}.c_fc.bias")
    down = (written.read(f"{name}.experts.down_proj") == dense.read(f"{name}.c_proj.weight").t()).all(1)
    assert torch.equal(kept, bias)
    assert torch.equal(kept, down)


ALONE = """
import sys
sys.modules["dense2moe"] = None
import torch, transformers
try:
    transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).replace("\\n", " "))
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model(torch.arange(8)[None]).logits.abs().sum().item())
"""


def test_a_mixture_is_loaded_without_dense2moe(tmp_path: Path) -> None:
    """By the source beside it, where that is trusted, in a process that cannot import this package."""
    plan = convert(save_dense(tmp_path / "dense", "bert"), tmp_path / "moe", PLAIN)
    found = run_python(ALONE, str(tmp_path / "moe"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    expected = load(tmp_path / "moe", plan)(torch.arange(8)[None]).logits.abs().sum().item()
    *refusal, total = found.splitlines()
    assert "trust_remote_code=True" in " ".join(refusal)
    assert float(total) == pytest.approx(expected, rel=1e-6)


REGISTERED = """
import sys
{imports}
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])
print(type(model).__module__, "torch" in before)
"""


@pytest.mark.parametrize("first", ["dense2moe", "transformers"])
def test_importing_dense2moe_is_enough(tmp_path: Path, first: str) -> None:
    """In either order; and the import by itself loads no torch."""
    convert(save_dense(tmp_path / "dense", "bert"), tmp_path / "moe", PLAIN)
    second = "transformers" if first == "dense2moe" else "dense2moe"
    imports = f"import {first}; before = set(sys.modules) if '{first}' == 'dense2moe' else (); import {second}"
    assert run_python(REGISTERED.format(imports=imports), str(tmp_path / "moe")) == (
        "dense2moe.upcycle.models.mixture False"
    )


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_family_with_a_sparse_twin_may_become_a_mixture_of_ours(tmp_path: Path) -> None:
    """T5 without gates becomes Switch unless it is told not to."""
    source = save_dense(tmp_path / "dense", "t5", feed_forward_proj="relu")
    alone = UpcycleConfig.model_validate({"num_experts": 4, "num_experts_per_tok": 1})
    assert plan_upcycle(open_checkpoint(source), alone).target_config.model_type == "switch_transformers"
    plan = convert(source, tmp_path / "moe", {**PLAIN, "target": "mixture"})
    assert plan.target_config.architectures == ["MixtureT5ForConditionalGeneration"]
    write_receipt(source, tmp_path / "moe", plan, 32, ignore)


def test_another_head_is_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert", "BertForMultipleChoice")
    with pytest.raises(UpcycleError, match="BertForMultipleChoice; it must be BertModel"):
        plan_upcycle(open_checkpoint(source), UpcycleConfig.model_validate(PLAIN))


def test_a_pretraining_checkpoint_loses_its_other_heads(tmp_path: Path) -> None:
    """As BERT is on the hub: the masked model's tensors, and those of a head that it has not, listed as dropped."""
    source = save_dense(tmp_path / "dense", "bert", "BertForPreTraining")
    edit_config(source, architectures=["BertForMaskedLM"])
    plan = convert(source, tmp_path / "moe", PLAIN)
    assert "cls.seq_relationship.weight" in plan.dropped
    assert not any("pooler" in write.spec.name for write in plan.writes)
    write_receipt(source, tmp_path / "moe", plan, 32, ignore)


def test_names_without_the_heads_prefix_are_known(tmp_path: Path) -> None:
    """As GPT-2 is on the hub: a model with a head, stored by its base model."""
    source = save_dense(tmp_path / "dense", "gpt2", "GPT2Model")
    edit_config(source, architectures=["GPT2LMHeadModel"])
    plan = convert(source, tmp_path / "moe", PLAIN)
    assert all(write.spec.name.startswith("transformer.") for write in plan.writes)
    write_receipt(source, tmp_path / "moe", plan, 32, ignore)


def test_a_base_model_may_lack_its_pooler(tmp_path: Path) -> None:
    """As encoders of sentences do on the hub; but not half of it, and not a model whose labels read it."""
    sources = {
        name: save_dense(tmp_path / name, "bert", f"Bert{name}") for name in ("Model", "ForSequenceClassification")
    }
    for source in sources.values():
        tensors = load_file(source / "model.safetensors")
        save_file(
            {name: value for name, value in tensors.items() if "pooler" not in name}, source / "model.safetensors"
        )
    plan = convert(sources["Model"], tmp_path / "moe", PLAIN)
    write_receipt(sources["Model"], tmp_path / "moe", plan, 32, ignore)
    with pytest.raises(UpcycleError, match=r"bert\.pooler\.dense\.weight' is missing"):
        plan_upcycle(open_checkpoint(sources["ForSequenceClassification"]), UpcycleConfig.model_validate(PLAIN))
    tensors = load_file(sources["Model"] / "model.safetensors") | {"pooler.dense.bias": torch.zeros(32)}
    save_file(tensors, sources["Model"] / "model.safetensors")
    with pytest.raises(UpcycleError, match=r"pooler\.dense\.weight' is missing"):
        plan_upcycle(open_checkpoint(sources["Model"]), UpcycleConfig.model_validate(PLAIN))


def edit_config(directory: Path, **values: Any) -> None:
    """Change values of a saved config."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_sources_are_fine_tuned_from_one_base(tmp_path: Path) -> None:
    """Each becomes an expert; another epsilon would be another function."""
    base = save_dense(tmp_path / "base", "bert")
    sources = {name: tmp_path / name for name in ("law", "code")}
    for number, directory in enumerate(sources.values()):
        fine_tune(base, directory, number)
    output = tmp_path / "moe"
    output.mkdir()
    settings = UpcycleConfig.model_validate({"num_experts_per_tok": 1, "merging": {"method": "base"}})
    plan = upcycle(base, output, settings, 0, ignore, sources=sources)
    check_written(base, output, plan, 0, ignore, sources=sources)
    written, dense = open_checkpoint(output), open_checkpoint(base)
    name = "bert.encoder.layer.1"
    for number, directory in enumerate(sources.values()):
        own = open_checkpoint(directory)
        for part, module in (("up_proj", "intermediate"), ("down_proj", "output")):
            for suffix, kind in (("", "weight"), ("_bias", "bias")):
                expert = written.read(f"{name}.intermediate.experts.{part}{suffix}")[number]
                assert torch.equal(expert, own.read(f"{name}.{module}.dense.{kind}"))
    kept = f"{name}.attention.self.query.weight"
    assert torch.equal(written.read(kept), dense.read(kept))
    edit_config(sources["code"], layer_norm_eps=1e-3)
    others = {name: open_checkpoint(directory) for name, directory in sources.items()}
    with pytest.raises(UpcycleError, match=r"sources.code.*layer_norm_eps is 0.001; the base has 1e-12"):
        plan_upcycle(dense, settings, others)


def test_no_code_beside_a_mixture_is_run(tmp_path: Path) -> None:
    """The class is this package's own, whatever lies in the checkpoint."""
    plan = convert(save_dense(tmp_path / "dense", "bert"), tmp_path / "moe", PLAIN)
    (tmp_path / "moe" / mixture.FILE_NAME).write_text("raise SystemExit('run')")
    model = load(tmp_path / "moe", plan)
    assert type(model).__module__ == mixture.__name__


@pytest.mark.parametrize(
    "section", [None, 7, {"num_experts": 4}, {"num_experts": 4, "num_experts_per_tok": 2, "sites": [{"ffn": "x"}]}]
)
def test_a_damaged_section_is_one_line(tmp_path: Path, section: Any) -> None:
    convert(save_dense(tmp_path / "dense", "bert"), tmp_path / "moe", PLAIN)
    edit_config(tmp_path / "moe", mixture=section)
    with pytest.raises(UpcycleError, match=r"config.json: transformers cannot"):
        open_checkpoint(tmp_path / "moe")
