"""The Python API does what its page shows, and is loaded only when it is used."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from worker_jobs import double

import dense2moe
from dense2moe import api
from dense2moe.convert.worker import run_apart
from dense2moe.new_directory import new_directory
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.errors import UpcycleError

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8"),
    flags=re.DOTALL | re.MULTILINE,
)
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")
RECIPE = """\
source: dense
data: {block_size: 32, source: {kind: text, train: [corpus.txt], separator: "---"}}
upcycle: {num_experts: 4}
finetune: null
variants: [float32]
parity: {num_blocks: 2, decode_steps: 4, noise_blocks: 1}
"""


@pytest.fixture
def folder(dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with what the examples begin from."""
    shutil.copytree(dense_checkpoint, tmp_path / "dense")
    (tmp_path / "corpus.txt").write_text(TEXT.replace("\n", "\n---\n"), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_its_page_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/python-api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown
    assert {"dense", "data", "mixture", "tuned", "twin", "int8", "work"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.partial"))
    package, settings = api.Package("int8"), api.GenerateConfig(max_new_tokens=8)
    assert package.generate("Licensed under", settings) == names["text"]
    assert package.generate(["Licensed under", "the"], settings)[0] == names["text"]
    assert "".join(package.stream("Licensed under", settings)) == names["text"]


def test_a_function_leaves_nothing_behind_when_it_refuses(folder: Path):
    with pytest.raises(api.MendableError, match=r"^upcycle\.layers: layer 99"):
        api.upcycle("dense", "mixture", api.UpcycleConfig(num_experts=4, num_experts_per_tok=2, layers=(99,)))
    assert not (folder / "mixture").exists()
    assert not (folder / "mixture.partial").exists()


def test_a_function_never_writes_over_what_is_there(folder: Path):
    for output in ("dense", "corpus.txt"):
        with pytest.raises(api.MendableError, match=f"^{output}: exists already; must be a new directory; give"):
            api.export_onnx("twin", output)


def test_routers_that_read_text_ask_for_it(folder: Path):
    config = api.UpcycleConfig(num_experts=4, router=api.RouterConfig(kind="kmeans"))
    with pytest.raises(api.MendableError, match="'kmeans' has no domains; give them, or `data`"):
        api.upcycle("dense", "mixture", config)


def test_every_public_function_has_an_example_on_the_page():
    for name in set(dense2moe.__all__) - {"__version__"} | {"upcycle", "add_expert", "branch", "prepare_data"}:
        assert re.search(rf"(= |^){name}\(", "\n".join(EXAMPLES), flags=re.MULTILINE), name
        assert "Raises:" in (getattr(api, name).__doc__ or ""), name


def run_python(code: str, folder: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder).stdout


def test_importing_the_package_loads_no_torch():
    code = """
import sys
import dense2moe
print(dense2moe.__version__, "torch" in sys.modules, "transformers" in sys.modules, "pydantic" in sys.modules)
"""
    version, *loaded = run_python(code).split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert loaded == ["False"] * 3


def test_the_package_gives_the_functions_of_the_api():
    for name in set(dense2moe.__all__) - {"__version__"}:
        assert getattr(dense2moe, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'transmogrify'"):
        _ = dense2moe.transmogrify


def test_a_stage_s_process_does_not_run_the_script_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A script that calls `run` needs no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'again')!r}, 'w')\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with open(tmp_path / "held", "w") as held:
        assert run_apart(double, 21, "a stage", held.fileno(), lambda *_: None).found == 42
    assert not (tmp_path / "again").exists()


def test_nothing_is_imported_by_a_bare_name():
    """Once installed, the three folders are modules of dense2moe, and their bare names are anybody's.

    Code in texts, which tests run in processes, counts.
    """
    floor = r"(convert|upcycle|export)\b"
    bare = re.compile(
        rf"""(^\s*|["']|;\s*)(from\s+{floor}[\w.]*\s+import|import\s+([\w.]+,\s*)*{floor})""", re.MULTILINE
    )
    files = [
        file
        for folder in ("dense2moe", "convert", "upcycle", "export", "tests", "benchmarks", "recipes", "docs")
        for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 200
    assert [str(file) for file in files if bare.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["file/output", "x" * 300, "a\0b"])
def test_a_place_where_no_directory_can_be_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UpcycleError, match="no directory can be made there") as caught, new_directory(tmp_path / name):
        pass
    assert "\n" not in str(caught.value)


def test_blocks_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"cannot be read .*; give the directory that prepare_data wrote"):
        read_blocks(tmp_path, "train")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: api.quantize("c", "o", "int5"), "quantize: variant is 'int5'; must be 'float32', .* or 'mixed'"),
        (lambda: api.quantize("c", "o", "int8", device="tpu"), "quantize: device is 'tpu'; must be 'cpu' or 'cuda'"),
        (lambda: api.quantize("c", "o", "int8", activation_bits=5), "quantize: activation_bits is 5; must be 8 or 32"),
        (lambda: api.upcycle("d", "o", seed=-1), "upcycle: seed is -1; must be greater than or equal to 0"),
        (lambda: api.upcycle("d", "o", seed="a"), "upcycle: seed is 'a'; must be a valid integer"),
        (
            lambda: api.check_parity("p", "r", "t", block_size=0),
            "check_parity: block_size is 0; must be greater than 0",
        ),
        (lambda: api.check_parity("p", "r", "t", num_blocks=-3), "check_parity: num_blocks is -3; must be greater .*"),
    ],
)
def test_a_wrong_argument_is_one_line_before_any_work(
    call: Callable[[], object], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UpcycleError) as caught:
        call()
    assert re.match(line, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
