"""Packages of mixtures of ours: what clients see, what torch gives, and parity that names a fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from test_hosts import PLAIN, convert, ignore, save_dense
from transformers import AutoModelForImageClassification

from dense2moe.convert.cli import main
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.single_pass import check_single_pass
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.storage import find_graph
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.mixture_classes import find_class

GROUPED = OnnxConfig(lowering="grouped")
CASES: list[tuple[str, str, Variant]] = [
    ("bert", "BertForTokenClassification", "int8"),
    ("vit", "ViTForImageClassification", "float32"),
    ("vit", "ViTForImageClassification", "int4"),
]
ONE_LAYER = ("BertForMaskedLM", "GPT2LMHeadModel")
"""What no test looks into: tracing takes seconds a layer."""


@dataclass(frozen=True)
class Exported:
    """A package and its twin."""

    package: Path
    twin: Path
    task: str


Export = Callable[[str, str, Variant], Exported]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Packages by host, class and variant, each made once."""
    made: dict[tuple[str, str, Variant], Exported] = {}
    mixtures: dict[tuple[str, str], tuple[Path, str]] = {}

    def make(name: str, architecture: str, variant: Variant) -> Exported:
        if (name, architecture) not in mixtures:
            folder = tmp_path_factory.mktemp(name)
            few = {"num_hidden_layers": 1} if architecture in ONE_LAYER else {}
            plan = convert(save_dense(folder / "dense", name, architecture, **few), folder / "moe", PLAIN)
            mixtures[name, architecture] = folder / "moe", plan.conversion.family.task
        if (name, architecture, variant) not in made:
            source, task = mixtures[name, architecture]
            twin, package = (source.parent / f"{kind}-{variant}" for kind in ("twin", "package"))
            for directory in (twin, package):
                directory.mkdir()
            quantize_checkpoint(source, twin, variant, QuantizeConfig(block_size=16), ignore)
            write_package(twin, package, GROUPED, ignore)
            made[name, architecture, variant] = Exported(package, twin, task)
        return made[name, architecture, variant]

    return make


@pytest.mark.parametrize(("name", "architecture", "variant"), CASES)
def test_a_package_computes_what_its_twin_does(export: Export, name: str, architecture: str, variant: Variant) -> None:
    """To float32's noise, whatever it rounds: padded rows, other lengths than traced, rows alone."""
    found = export(name, architecture, variant)
    parity = check_single_pass(found.package, found.twin)
    assert parity.passed, parity.breaches
    assert {check.tier for check in parity.checks} == {"layer", "outputs", "rows"}
    assert max(check.error for check in parity.checks if check.tier == "layer") < 1e-5


def test_masked_language_models_are_transformers_own(export: Export) -> None:
    """By plain torch and onnxruntime, without parity between: within 1e-4, at batch 1 and 3."""
    found = export("bert", "BertForMaskedLM", "float32")
    package, model = SinglePass(found.package), load_model(found.twin, torch.float32, "fill-mask")
    for rows, length in ((1, 7), (3, 19)):
        ids = torch.randint(5, 96, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 50).long()}
        with torch.no_grad():
            expected = model(**given).logits[mask.bool()]
        error = (package.run(given)["logits"][mask.bool()] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4
    with pytest.raises(ExportError, match="reads input_ids, attention_mask, token_type_ids; attention_mask was not"):
        package.run({"input_ids": ids})


def test_clients_are_told_the_dense_family(export: Export) -> None:
    found = export("bert", "BertForTokenClassification", "int8")
    config = json.loads((found.package / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForTokenClassification"])
    assert config["mixture"]["num_experts"] == 4
    assert "auto_map" not in config
    assert not (found.package / "genai_config.json").exists()
    graph = onnx.load(find_graph(found.package), load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in graph.output] == ["logits"]


def test_gpt2_decodes_with_a_cache(export: Export) -> None:
    """Token by token as in one pass, and as transformers does."""
    found = export("gpt2", "GPT2LMHeadModel", "float32")
    decoder, model = Decoder(found.package), load_model(found.twin, torch.float32)
    ids = torch.randint(5, 96, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    cache = decoder.new_cache(2, 9)
    decoder.run(cache, ids[:, :4].numpy())
    steps = [torch.tensor(decoder.run(cache, ids[:, n : n + 1].numpy())["logits"]) for n in range(4, 9)]
    error = (torch.cat(steps, 1) - expected[:, 4:]).abs().max() / expected.abs().max()
    assert error < 1e-5


def plant_epsilon(package: Path, target: Path, number: int) -> Path:
    """The package with another epsilon in one of its norms."""
    shutil.copytree(package, target)
    model = onnx.load(find_graph(package), load_external_data=False)
    norm = [node for node in model.graph.node if node.op_type == "LayerNormalization"][number]
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-2
    onnx.save(model, find_graph(target))
    return target


@pytest.mark.parametrize(("name", "architecture", "variant", "number", "layer"), [(*CASES[0], 3, 1), (*CASES[2], 0, 0)])
def test_a_fault_is_named_in_its_layer(
    export: Export, tmp_path: Path, name: str, architecture: str, variant: Variant, number: int, layer: int
) -> None:
    """In 8 and 4 bits too, and the layers after it are right on their own inputs."""
    found = export(name, architecture, variant)
    parity = check_single_pass(plant_epsilon(found.package, tmp_path / "broken", number), found.twin)
    wrong = [check for check in parity.checks if check.tier == "layer" and not check.is_right]
    assert wrong
    assert all(f"layer {layer} " in check.where for check in wrong)


def test_the_command_tells_of_a_package_of_one_pass(export: Export, tmp_path: Path) -> None:
    found = export("vit", "ViTForImageClassification", "int4")
    arguments: list[Any] = ["parity", found.package, "--reference", found.twin, "--json", tmp_path / "figures.json"]
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "not judged: speed" in done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["passed"]
    assert all(check["difference"]["relative"] <= check["limit"] for check in figures["checks"])
    arguments[1] = plant_epsilon(found.package, tmp_path / "broken", 0)
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 1
    assert "layer: layer 0 on the graph's own input" in done.output


@torch.no_grad()
def test_a_mixture_of_which_no_layer_has_experts_is_written_too(tmp_path: Path) -> None:
    """As the dense model: what `benchmarks/encoders.py` compares with."""
    source = convert_to_dense(tmp_path)
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(source, twin, "float32", QuantizeConfig(), ignore)
    assert write_package(twin, package, OnnxConfig(), ignore).lowering == "none"
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    size = (2, dense.config.num_channels, dense.config.image_size, dense.config.image_size)
    given = {"pixel_values": torch.randn(size, generator=torch.Generator().manual_seed(0))}
    expected = dense.eval()(**given).logits
    found = SinglePass(package).run(given)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def convert_to_dense(folder: Path) -> Path:
    """A dense model's weights under the config of its mixture, which has experts in no layer."""
    plan = convert(save_dense(folder / "dense", "vit", "ViTForImageClassification"), folder / "moe", PLAIN)
    config: Any = plan.target_config
    for site in config.mixture["sites"]:
        site["layers"] = []
    model = find_class(config.architectures[0])(config)
    dense = AutoModelForImageClassification.from_pretrained(folder / "dense")
    model.load_state_dict(dense.state_dict())
    model.save_pretrained(folder / "none")
    return folder / "none"
