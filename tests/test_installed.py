"""The `installed` data set: what packages recorded, and nothing of held-out files in the training text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dense2moe.upcycle.data.blocks import check_data, prepare_data
from dense2moe.upcycle.data.config import DataConfig, InstalledData
from dense2moe.upcycle.data.held_out import SPLITS, paragraph_key, paragraphs, split_of
from dense2moe.upcycle.data.installed import read_installed
from dense2moe.upcycle.errors import UpcycleError

LICENCE = "Licensed under terms that every file of this package quotes in full."
Install = Callable[..., None]


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package of the given files, as pip leaves one behind."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def write(name: str, files: dict[str, str | bytes], version: str = "1.2") -> None:
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file, text in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        recorded = [f"{info.name}/METADATA", *files, "../../bin/tool"]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in recorded))

    return write


def write_files(folder: str, ending: str, count: int = 60) -> dict[str, str | bytes]:
    return {
        f"{folder}/part{number}.{ending}": f"{LICENCE}\n\nWhat {folder} says of {number} in {ending}.\n" * 3
        for number in range(count)
    }


def settings(**domains: dict[str, tuple[str, ...]]) -> InstalledData:
    return InstalledData.model_validate({"kind": "installed", "domains": domains})


HEADERS = {"packages": ("alpha",), "files": ("alpha/*.h",)}
NOTES = {"packages": ("alpha", "beta"), "files": ("*.md",)}


@pytest.fixture
def installed(install: Install) -> None:
    tables: dict[str, str | bytes] = {"alpha/table.h": "7 " * 300_000, "alpha/latin.h": "é".encode("latin-1")}
    install("alpha", {**write_files("alpha", "h"), **write_files("alpha", "md"), **tables})
    install("beta", write_files("beta/docs", "md"), version="7.0")


def test_a_file_is_a_document_of_its_domain_and_falls_into_the_split_of_its_name(installed: None) -> None:
    found = read_installed(settings(headers=HEADERS, notes=NOTES))
    names = {each.name: (split, each.domain) for split in SPLITS for each in found.documents[split]}
    expected = {
        **{f"alpha/part{number}.h": "headers" for number in range(60)},
        **{f"{folder}/part{number}.md": "notes" for folder in ("alpha", "beta/docs") for number in range(60)},
    }
    assert names == {name: (split_of(name), domain) for name, domain in expected.items()}
    assert found.versions == {"alpha": "1.2", "beta": "7.0"}


def test_what_held_out_files_share_with_others_is_held_out(installed: None) -> None:
    documents = read_installed(settings(headers=HEADERS, notes=NOTES)).documents
    keys = {
        split: {paragraph_key(paragraph) for each in documents[split] for paragraph in paragraphs(each.text)} - {""}
        for split in SPLITS
    }
    assert paragraph_key(LICENCE) in keys["test"]
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    assert all("says of" in each.text for each in documents["train"])


def test_other_packages_and_the_order_of_patterns_change_nothing(installed: None, install: Install) -> None:
    before = read_installed(settings(notes=NOTES))
    install("gamma", write_files("gamma", "md"))
    assert read_installed(settings(notes=NOTES)) == before
    assert read_installed(settings(notes={**NOTES, "files": ("beta/*", "alpha/*.md")})).digest == before.digest
    assert read_installed(settings(notes={**NOTES, "packages": ("beta",)})).digest != before.digest


def test_domains_become_blocks(installed: None, dense_checkpoint: Path, tmp_path: Path) -> None:
    config = DataConfig(source=settings(headers=HEADERS, notes=NOTES), block_size=16)
    check_data(dense_checkpoint, config, tmp_path, 10**6)
    output = tmp_path / "blocks"
    output.mkdir()
    facts = prepare_data(dense_checkpoint, output, config, tmp_path, quiet)
    assert facts["domains"] == ["headers", "notes"]
    assert facts["packages"] == "alpha 1.2, beta 7.0"
    assert facts["digest"] == read_installed(config.source).digest  # type: ignore[arg-type]
    for split in SPLITS:
        assert load_file(output / f"{split}.safetensors")["domains"].unique().tolist() == [0, 1]


def test_a_real_package_can_be_read() -> None:
    documents = read_installed(settings(code={"packages": ("click", "jinja2", "rich"), "files": ("*.py",)})).documents
    assert all(documents[split] for split in SPLITS)
    assert any("def " in each.text for each in documents["test"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"packages": ("alpha", "delta"), "files": ("*.h",)},
            "data.source.domains.headers.packages: 'delta' is not installed; install it (pip install 'delta'), or name "
            "another",
        ),
        (
            {"packages": ("alpha",), "files": ("alpha/*.h", "*.rst")},
            "data.source.domains.headers.files: '*.rst' matches no file that alpha recorded; give a pattern such as "
            "'numpy/*.py', whose * also stands for /",
        ),
        (
            {"packages": ("alpha",), "files": ("alpha/part1.h",)},
            "data.source.domains.headers: no document falls into the validation split; name more files or packages",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_domain(
    part: dict[str, tuple[str, ...]], message: str, installed: None, dense_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError) as refusal:
        read_installed(settings(headers=part, notes=NOTES))
    assert str(refusal.value) == message
    if "split" not in message:
        with pytest.raises(UpcycleError) as checked:
            check_data(dense_checkpoint, DataConfig(source=settings(headers=part)), tmp_path, 10**6)
        assert str(checked.value) == message
