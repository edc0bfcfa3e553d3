"""Model cards: what the hub reads of them, what people read, and the code in them runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from programs import dense2moe
from report_facts import HOSTILE, classified, make_facts, records, tiered

from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.report.card import write_card
from dense2moe.convert.report.license import read_license
from dense2moe.convert.report.writer import write_report
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint


def silent(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 package of the tiny mixture."""
    twin, output = tmp_path_factory.mktemp("twin"), tmp_path_factory.mktemp("package")
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(method="round"), silent)
    write_package(twin, output, OnnxConfig(lowering="grouped"), silent)
    return output


@pytest.fixture
def facts() -> dict[str, Any]:
    return make_facts()


def card_of(facts: dict[str, Any], package: Path, output: Path, variant: str = "float32") -> ModelCard:
    write_card(records(facts), variant, package, output)
    return ModelCard.load(output / "README.md")


def test_the_hub_reads_the_metadata(facts, package, tmp_path) -> None:
    data = card_of(facts, package, tmp_path, "int8").data
    assert (data.license, data.base_model, data.pipeline_tag, data.library_name) == (
        "apache-2.0",
        "someone/python-docs-4m",
        "text-generation",
        "onnx",
    )
    assert {"onnx", "mixture-of-experts", "int8"} <= set(data.tags)


@pytest.mark.parametrize(
    ("base_model", "origin", "name"),
    [
        ("someone/python-docs-4m", "someone/python-docs-4m@main", "someone/python-docs-4m"),
        (None, "/data/models/python-docs-4m", "python-docs-4m"),
        (None, "../a\n model/", "a model"),
    ],
)
def test_the_source_has_the_name_that_its_user_knows(base_model, origin, name, facts, package, tmp_path) -> None:
    facts["base_model"], facts["source"]["origin"] = base_model, origin
    card = card_of(facts, package, tmp_path)
    assert card.data.base_model == name
    assert f"\"  # the mixture made from {name}, in the run's work directory\n" in card.text
    assert "/data/" not in card.text


@pytest.mark.parametrize(("head_dim", "told"), [(None, False), (8, False), (24, True)])
def test_optimum_is_told_a_size_of_heads_that_it_does_not_read(head_dim, told, facts, package, tmp_path) -> None:
    other = shutil.copytree(package, tmp_path / "package")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"head_dim": head_dim}))
    assert ("model.embed_size_per_head = model.config.head_dim" in card_of(facts, other, tmp_path).text) == told


def test_without_fine_tuning_the_checkpoint_is_the_upcycled_one(facts, package, tmp_path) -> None:
    for name in ("fine-tuned", "dense continued", "dense, equal time"):
        facts["finetune"]["evaluations"].pop(name, None)
    facts["keys"]["upcycle"] = "5" * 64
    assert f'checkpoint = "upcycle-{"5" * 12}"' in card_of(facts, package, tmp_path).text


def test_what_is_not_known_is_not_in_the_metadata(facts, package, tmp_path) -> None:
    facts["license"] = {}
    card = card_of(facts, package, tmp_path)
    assert "license" not in card.data.to_dict()
    assert "names no licence" in card.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\ntags: [a]\n---\n# x\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [mit, other]\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("# no metadata\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_source_s_card(tmp_path, text, expected) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert read_license(tmp_path) == expected


def test_the_card_tells_the_verdict_the_figures_and_where_it_comes_from(facts, package, tmp_path) -> None:
    text = card_of(tiered(facts), package, tmp_path, "int8").text
    assert "**Parity passed**" in text
    assert "| ONNX int8 | passed | 11.24 | 12.3 MB | 99.61 % | 99.69 % | 622 | 12,440 |" in text
    assert "ONNX int4" not in text
    assert "- ONNX int8: perplexity 11.24, 0.06 % worse than ONNX float32's; parity passed." in text
    assert "- routing: Does every token visit the same experts? passed." in text
    assert HOSTILE.strip() in text
    assert f"| SHA-256 of model.onnx | `{'a7' * 32}` |" in text


def test_the_card_of_a_classifier_speaks_of_its_own_figure(facts, package, tmp_path) -> None:
    text = card_of(tiered(classified(facts)), package, tmp_path, "int8").text
    assert "| Model | Parity | F1 | Size |" in text
    assert "F1 is measured on held-out text; higher is better." in text
    assert "erplexity" not in text


def test_a_broken_parity_stands_at_the_head(facts, package, tmp_path) -> None:
    breach = "CPUExecutionProvider: routing: agreement with the twin 0.9 < 0.97"
    facts["variants"]["float32"]["parity"].update(passed=False, breaches=[breach])
    text = card_of(facts, package, tmp_path).text
    assert "**Parity FAILED**" in text
    assert text.index(breach) < text.index("## How to run it")


def test_a_recipe_with_a_fence_does_not_end_its_own(facts, package, tmp_path) -> None:
    facts["recipe"] = "name: x # ```` and\n```\n# injected\n"
    text = card_of(facts, package, tmp_path).text
    assert "\n`````yaml\nname: x # ```` and\n```\n# injected\n`````\n" in text


def test_a_card_names_no_runtime_that_cannot_read_the_package(facts, package, tmp_path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "config.json").write_text(
        (package / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    assert "genai" not in card_of(facts, tmp_path / "package", tmp_path).text


@pytest.fixture
def workdir(made_workdir, tmp_path) -> Path:
    """A work directory with two sealed artifacts, the package and the report."""
    return shutil.copytree(made_workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def made_workdir(package, tmp_path_factory) -> Path:
    directories, facts, run = {}, make_facts(), tmp_path_factory.mktemp("run")
    for label, key in (("onnx-float32", "1" * 64), ("report", "2" * 64)):
        with build(run, label, key) as draft:
            if label == "report":
                write_report(facts, draft.directory)
                write_card(records(facts), "float32", package, draft.directory / "cards" / "float32")
            else:
                for path in package.iterdir():
                    (draft.directory / path.name).write_bytes(path.read_bytes())
            facts_of = facts if label == "report" else {}
            directories[label] = draft.seal(inputs={}, settings={}, facts=facts_of, versions={}, seed=0).directory.name
    state = {"name": "tiny", "status": "finished", "recipe": "tiny.yaml", "artifacts": directories}
    (run / "run.json").write_text(json.dumps(state), encoding="utf-8")
    return run


def invoke(*arguments: object) -> tuple[int, str]:
    result = dense2moe(*arguments)
    return result.exit_code, result.output


def test_a_package_is_gathered_with_its_card_and_runs(workdir, package, tmp_path) -> None:
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    code, output = invoke("package", workdir, tmp_path / "out")
    assert (code, output.startswith(f"{tmp_path / 'out'}: float32, ")) == (0, True), output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in package.iterdir()} | {"README.md", "report.html", "SHA256SUMS"}
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "onnx"
    assert invoke("generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 4) == invoke(
        "generate", package, "--prompt", "a", "--max-new-tokens", 4
    )
    again = invoke("package", workdir, tmp_path / "out")
    assert again == (1, f"Error: {tmp_path / 'out'}: exists already; give a new directory\n")


def test_what_was_gathered_is_verified_by_its_digests(workdir, tmp_path) -> None:
    output = tmp_path / "out"
    assert invoke("package", workdir, output)[0] == 0
    assert invoke("verify", output) == (0, f"{output}: a package, every file as SHA256SUMS says\n")
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=output, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
    (output / ".gitattributes").write_text("*.data filter=lfs\n", encoding="utf-8")  # as the hub puts it there
    assert invoke("verify", output)[0] == 0
    (output / "config.json").write_text("{}", encoding="utf-8")
    (output / "report.html").unlink()
    (output / "other.txt").touch()
    code, said = invoke("verify", output)
    assert code == 1
    assert re.sub("[0-9a-f]{12}", "DIGEST", said).replace(f"{output}: ", "").removeprefix("Error: ").splitlines() == [
        "config.json: SHA-256 DIGEST...; must be DIGEST...",
        "report.html: missing",
        "other.txt: extra; not in SHA256SUMS",
    ]
    (output / "SHA256SUMS").write_text(f"{64 * '0'}  ../config.json\n", encoding="utf-8")
    code, said = invoke("verify", output)
    assert code == 1
    assert said.startswith(f"Error: {output / 'SHA256SUMS'}:1: is '000") and said.count("\n") == 1


def test_a_variant_of_a_package_is_refused(package) -> None:
    message = f"Error: {package}: is not the work directory of a run, which --variant chooses from; leave it out\n"
    for arguments in (("generate", "--prompt", "a"), ("bench",), ("parity", "--reference", package, "--data", "text")):
        assert invoke(*arguments, package, "--variant", "float32") == (1, message)


def test_a_spoilt_package_is_not_given_away(workdir, tmp_path) -> None:
    data = next(workdir.glob("onnx-*/model.onnx_data"))
    spoilt = bytearray(data.read_bytes())
    spoilt[100] ^= 1
    data.write_bytes(spoilt)
    code, output = invoke("package", workdir, tmp_path / "out")
    assert code == 1
    assert "model.onnx_data: SHA-256 " in output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
