"""The command line: what it prints, and how it fails."""

import errno
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from programs import dense2moe
from safetensors.torch import load_file, save_file
from told import tells

from dense2moe.convert.cli import main
from dense2moe.convert.cli.terminal import open_console
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.upcycle.errors import UpcycleError

ROOT = Path(__file__).parent.parent

RECIPE = """\
source: {source}
data:
  source: {{kind: text, train: [{text}], separator: "\\n\\n"}}
  block_size: 32
"""


@pytest.fixture
def recipe(tmp_path, dense_checkpoint):
    """A function that writes a recipe for the tiny dense checkpoint and some text of ours, with lines added."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "upcycle" / "checkpoints" / "reader.py").read_text(encoding="utf-8"), encoding="utf-8")

    def write(*lines: str, source: Path = dense_checkpoint) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(source=source, text=text) + "\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def invoke(*arguments: object) -> tuple[int, str]:
    result = dense2moe(*arguments)
    return result.exit_code, result.output


def test_the_commands_are_these():
    assert sorted(main.commands) == [
        "add-expert",
        "bench",
        "check",
        "compare",
        "generate",
        "package",
        "parity",
        "plan",
        "predict",
        "run",
        "schema",
        "show",
        "verify",
    ]


def test_what_may_not_be_read_is_refused_by_us_and_not_in_click_s_two_lines(tmp_path, monkeypatch):
    paths = [each.type for command in main.commands.values() for each in command.params]
    paths = [each for each in paths if isinstance(each, click.Path)]
    assert len(paths) > 12
    assert not any(each.exists or each.readable or each.writable or not each.dir_okay for each in paths)

    opened = Path.open

    def refuse(path, *arguments, **settings):
        if path.name == "r.yaml":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **settings)

    (tmp_path / "r.yaml").write_text("source: x\n", encoding="utf-8")
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    refusal = f"Error: {tmp_path}/r.yaml: cannot be read: Permission denied; give the path of a recipe\n"
    assert invoke("check", tmp_path / "r.yaml") == (1, refusal)


def test_python_m_convert_is_the_same_program():
    finished = subprocess.run(
        [sys.executable, "-m", "dense2moe", "--version"], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "dense2moe, version 0.1.0\n"


def test_help_needs_no_torch():
    code = (
        "import sys, dense2moe.convert.cli; dense2moe.convert.cli.main(['--help'], standalone_mode=False); assert "
        "'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_schema_is_the_json_schema_that_the_recipes_name():
    code, output = invoke("schema")
    assert code == 0
    assert json.loads(output) == json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))


def test_check_says_what_becomes_what(recipe):
    path = recipe()
    assert invoke("check", path) == (0, f"{path}: good. LlamaForCausalLM to MixtralForCausalLM, float32, int8, int4\n")


def test_plan_writes_nothing_and_shows_sizes(recipe, tmp_path):
    before = sorted(tmp_path.iterdir())
    path = recipe()
    code, output = invoke("plan", path, "--workdir", tmp_path / "work")
    assert code == 0
    assert "LlamaForCausalLM to MixtralForCausalLM" in output
    assert "active a token" in output
    assert sorted(tmp_path.iterdir()) == sorted([*before, path])


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_misspelt_key_is_one_line(recipe, command):
    path = recipe("upcycle: {topk: 2}")
    code, output = invoke(command, path)
    assert code == 1
    assert tells(output, f"Error: {path}:5: upcycle.topk", "'num_experts_per_tok'")


def test_more_chosen_experts_than_experts_is_refused(recipe):
    path = recipe("upcycle: {num_experts: 2, num_experts_per_tok: 3}")
    code, output = invoke("check", path)
    assert code == 1
    assert "num_experts_per_tok is 3; it must be at most num_experts, which is 2" in output


def test_a_refused_family_is_named_with_the_reason(recipe, tmp_path):
    source = tmp_path / "bitnet"
    source.mkdir()
    (source / "config.json").write_text(
        '{"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}', encoding="utf-8"
    )
    (source / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    code, output = invoke("check", recipe(source=source))
    assert code == 1
    assert output.startswith(f"Error: {source / 'config.json'}: BitNetForCausalLM (bitnet) has a norm within its FFN")


@pytest.mark.parametrize("nonsense", [{"intermediate_size": -1}, {"hidden_act": "sillu"}, {"architectures": 1}])
def test_nonsense_in_the_sources_config_is_one_line_of_plan(nonsense, recipe, dense_checkpoint, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense_checkpoint, source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | nonsense), encoding="utf-8")
    code, output = invoke("plan", recipe(source=source))
    assert code == 1
    assert output.startswith(f"Error: {source / 'config.json'}: ")
    assert output.count("\n") == 1


def test_a_tensor_that_the_plan_drops_may_be_of_any_dtype_in_a_run_too(recipe, dense_checkpoint, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense_checkpoint, source)
    state = load_file(source / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    code, output = invoke("run", recipe(source=source), "--workdir", tmp_path / "work", "--until", "source")
    assert code == 0, output


def test_a_missing_source_names_the_places_tried(recipe, tmp_path):
    path = recipe(source="nowhere")
    code, output = invoke("check", path)
    assert code == 1
    remedy = "correct the path, or write `source: {hub: nowhere}` for a model of the Hugging Face hub"
    tried = f"{tmp_path / 'nowhere'} and {Path.cwd() / 'nowhere'}"
    assert output == f"Error: {path}:1: source: 'nowhere' is not there; looked for {tried}; {remedy}\n"


def test_a_run_and_its_source_can_be_moved_together(recipe, tmp_path, dense_checkpoint):
    home, moved = tmp_path / "home", tmp_path / "elsewhere" / "moved"
    shutil.copytree(dense_checkpoint, home / "dense")
    assert invoke("run", recipe(source=home / "dense"), "--workdir", home / "run", "--until", "source")[0] == 0
    moved.parent.mkdir()
    home.rename(moved)
    (source,) = (path for path in (moved / "run").iterdir() if path.is_dir())
    assert (source / "config.json").is_symlink()
    assert invoke("verify", source)[0] == 0


def test_a_refused_run_leaves_nothing(recipe, tmp_path):
    workdir = tmp_path / "work"
    code, _ = invoke("run", recipe("upcycle: {num_experts: 0}"), "--workdir", workdir)
    assert code == 1
    assert not workdir.exists()


def test_a_disk_that_is_too_small_is_refused_before_any_work(recipe, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    workdir = tmp_path / "work"
    code, output = invoke("run", recipe(), "--workdir", workdir)
    assert code == 1
    assert output.startswith(f"Error: {workdir}: 1.0 kB free on this disk; ")
    assert output.endswith("needed; free some space, or give another --workdir\n")
    assert {path.name for path in workdir.iterdir()} == {".lock"}


def test_show_of_no_run_says_what_to_give(tmp_path):
    assert invoke("show", tmp_path) == (
        1,
        f"Error: {tmp_path}: no run.json; it must be the work directory of a run, such as runs/quickstart\n",
    )


def test_generate_of_no_package_says_what_to_give(tmp_path):
    code, output = invoke("generate", tmp_path, "--prompt", "x")
    assert code == 1
    assert tells(output, f"Error: {tmp_path}: no model.onnx", "ONNX package")


def test_a_reader_that_goes_away_is_no_error(recipe, tmp_path):
    """`dense2moe schema | head -1`: the pipe breaks, and nothing is said of it."""
    command = f'"{sys.executable}" -m dense2moe schema | head -1'
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert finished.stdout == "{\n"
    assert finished.stderr == ""


def test_a_bug_keeps_its_traceback(recipe, monkeypatch):
    def fail(*_):
        raise KeyError("planted")

    monkeypatch.setattr("dense2moe.convert.checking.prepare", fail)
    with pytest.raises(KeyError, match="planted"):
        invoke("check", recipe())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_in_any_stage_is_one_line_and_leaves_nothing_half_written(
    recipe, tmp_path, monkeypatch, error
):
    def fail(*_):
        raise error

    monkeypatch.setattr("dense2moe.convert.stages.source.check_values", fail)
    workdir = tmp_path / "work"
    code, output = invoke("run", recipe(), "--workdir", workdir)
    assert code == 1
    assert output.splitlines()[-1] == (
        "Error: source: out of memory; what is finished is kept; run the same command to resume; close "
        "other programs, or take a smaller "
        "model, data.block_size or finetune.batch_size"
    )
    assert {path.name for path in workdir.iterdir()} == {".lock", "run.json"}


def test_a_stage_that_says_itself_what_to_do_about_memory_keeps_its_words(recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise UpcycleError(
            "finetune: out of memory while training fine-tuned; the last good checkpoint is checkpoint-2"
        )

    monkeypatch.setattr("dense2moe.convert.stages.source.check_values", fail)
    code, output = invoke("run", recipe(), "--workdir", tmp_path / "work")
    assert code == 1
    assert (
        output.splitlines()[-1]
        == "Error: finetune: out of memory while training fine-tuned; the last good checkpoint is checkpoint-2"
    )


@pytest.fixture(scope="module")
def package(mixture_checkpoint, tmp_path_factory):
    """The float32 package of the tiny mixture, its tokenizer with it."""
    twin, output = tmp_path_factory.mktemp("twin"), tmp_path_factory.mktemp("package")
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(method="search"), lambda *_: None)
    write_package(twin, output, OnnxConfig(lowering="grouped"), lambda *_: None)
    return output


def test_several_prompts_give_what_each_gives_alone(package, tmp_path):
    texts, options = ["the work", "a", "Licensed under the Apache License"], ("--max-new-tokens", 12)
    alone = [invoke("generate", package, "--prompt", text, *options) for text in texts]
    assert all(
        code == 0 and output.startswith(text) and len(output) > len(text) + 1
        for (code, output), text in zip(alone, texts, strict=True)
    )
    together = "".join(f"== {number} of 3\n{output}" for number, (_, output) in enumerate(alone, 1))
    assert invoke("generate", package, *(part for text in texts for part in ("--prompt", text)), *options) == (
        0,
        together,
    )
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(texts[1:]) + "\n", encoding="utf-8")
    assert invoke("generate", package, "--prompt", texts[0], "--prompts", lines, *options) == (0, together)


def test_a_prompt_may_be_read_from_standard_input(package):
    result = dense2moe("generate", package, "--prompt", "-", "--max-new-tokens", 5, input="the work\n")
    assert result.output == invoke("generate", package, "--prompt", "the work", "--max-new-tokens", 5)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n\ntwo\n", "{path}:2: is empty; every line must be a prompt"),
        (b"", "no prompt; give --prompt, or --prompts with a file of them"),
    ],
)
def test_a_file_without_good_prompts_is_refused(package, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert invoke("generate", package, "--prompts", path) == (1, f"Error: {message.format(path=path)}\n")


def test_a_file_of_prompts_that_cannot_be_read_is_one_line(package, tmp_path):
    code, output = invoke("generate", package, "--prompts", tmp_path / "none.txt")
    assert (code, output.count("\n")) == (1, 1)
    assert output.startswith(f"Error: {tmp_path / 'none.txt'}: cannot be read (")


def test_a_prompt_longer_than_the_context_is_one_line(package):
    short, long = ("--prompt", "a"), ("--prompt", "x " * 300)
    for prompts, where in ((long, "the prompt"), ((*short, *long), "prompt 2")):
        code, output = invoke("generate", package, *prompts)
        assert code == 1
        assert re.fullmatch(rf"Error: {where}: has \d+ tokens; the model's context holds 256; shorten it\n", output)


def test_in_80_columns_no_line_of_help_is_cut() -> None:
    said = dense2moe("--help", terminal_width=80).output
    commands = said[said.index("Commands:") :].splitlines()[1:]
    assert len(commands) == len(main.commands)
    assert not [line for line in commands if line.endswith("...")]
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(("columns", "width"), [("70", 70), ("160", 160), ("", 100)])
def test_what_goes_into_a_pipe_is_as_wide_as_columns_says(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", columns)
    assert open_console().width == width
