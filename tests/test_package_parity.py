"""The command `parity` and the pytest fixture judge packages of ours and of other makers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from programs import dense2moe

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.placement import count_elsewhere, find_placement
from dense2moe.export.parity.precision import Precision, find_precision
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, CUDA, is_at_hand
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant
from tests.conftest import MakeDense
from tests.foreign import build_by_genai

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "LICENSE"
NOT_SHOWN = {
    "operator": "not run: the package shows no layers of experts",
    "routing": "not run: the package shows no router logits",
    "task": "not run: no task was given",
}


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def parity(package: Path, reference: Path, *options: object, text: Path = TEXT) -> Result:
    return dense2moe(
        "parity", package, "--reference", reference, "--data", text, "--blocks", 4, "--block-size", 48, *options
    )


@pytest.fixture(scope="module")
def llama(make_dense: MakeDense) -> Path:
    """A dense Llama that onnxruntime-genai's builder takes. Shared: read only."""
    return make_dense(hidden_size=64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def genai_package(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What onnxruntime-genai's model builder writes of it in float32. Shared: read only."""
    return build_by_genai(llama, tmp_path_factory.mktemp("genai") / "package", "fp32")


@pytest.fixture(scope="module")
def own_package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture exported by ourselves in float32. Shared: read only."""
    return export(mixture_checkpoint, tmp_path_factory.mktemp("own"), "float32")


def export(checkpoint: Path, folder: Path, variant: Variant, activation_bits: int = 32) -> Path:
    twin, package = folder / "twin", folder / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(checkpoint, twin, variant, QuantizeConfig(method="round", block_size=16), silent)
    write_package(twin, package, OnnxConfig(lowering="unrolled", activation_bits=activation_bits), silent)
    return package


def test_a_package_of_genai_s_builder_is_its_checkpoint(genai_package: Path, llama: Path, tmp_path: Path) -> None:
    result = parity(genai_package, llama, "--no-padding", "--json", tmp_path / "parity.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("parity passed\n")
    found = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert found["passed"]
    figures = found["providers"][CPU]
    assert figures["tiers"] == {
        **NOT_SHOWN,
        **dict.fromkeys(("weights", "layer", "logits", "language", "files"), "passed"),
    }
    # found by their weights
    assert {place["part"] for place in figures["places"]} == {
        "embedding",
        "attention norm",
        "query, key and value",
        "cache",
        "attention",
        "attention output",
        "FFN norm",
        "FFN",
        "final norm",
        "head",
    }
    assert max(check["relative_error"] for check in figures["checks"]) < 5e-6  # float32 sums in another order
    assert figures["figures"][0]["value"] == pytest.approx(figures["finetuned_figures"][0]["value"], rel=1e-6)


def test_what_genai_s_builder_does_with_left_padding_is_named(genai_package: Path, llama: Path) -> None:
    """Its graph counts the mask's ones and no more, so a row padded at its left reads the padding."""
    result = parity(genai_package, llama)
    assert result.exit_code == 1
    lines = result.stderr.split("parity was broken:\n")[1].splitlines()
    line = re.compile(
        rf"{CPU}: logits: .*, left padding: .* \(every row without padding is right: look at left padding, its mask "
        r"and positions\)"
    )
    assert len(lines) == 2
    assert all(line.fullmatch(each) for each in lines)


def test_another_checkpoint_is_not_the_package(genai_package: Path, make_dense: MakeDense) -> None:
    other = make_dense(hidden_size=64, num_hidden_layers=1, rope_theta=500.0)
    result = parity(genai_package, other, "--no-padding")
    assert result.exit_code == 1
    lines = result.stderr.split("parity was broken:\n")[1].splitlines()
    hint = r"from token 1 on \(the first token is right: look at positions and rotary tables\)"
    where = "layer 0, the cached keys and values, on the graph's own input: relative error"
    assert re.fullmatch(rf"{CPU}: layer: {where} .*, {hint}", lines[0])
    assert sum(where in line for line in lines) == 1  # and not once more for each way of feeding it
    assert any(line.startswith(f"{CPU}: logits: greedy text differs after 0 of 32 tokens") for line in lines)


def test_a_quantized_package_of_another_maker_is_held_to_its_perplexity(tmp_path: Path) -> None:
    llama = ROOT / "recipes" / "models" / "python-docs-4m"  # a trained one: random weights may lose nothing
    package = build_by_genai(llama, tmp_path / "package", "int4")
    assert find_precision(package).variant == "int4"
    padded = parity(package, llama, "--max-perplexity-increase", 10)  # it is judged against itself
    assert [
        line for line in padded.stderr.splitlines() if line.startswith(CPU) and "look at left padding" not in line
    ] == []
    loose = parity(package, llama, "--no-padding", "--max-perplexity-increase", 10, "--json", tmp_path / "parity.json")
    assert loose.exit_code == 0
    judged = "only the perplexity, the files and the package against itself are judged, unless --twin is given"
    assert loose.stdout.endswith(f"parity passed: its weights are not the reference's: {judged}\n")
    figures = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["providers"][CPU]
    without = "no checkpoint with the package's own weights was given"
    assert (
        figures["tiers"]["logits"]
        == f"passed: each way of feeding it against itself; not judged against torch: {without}"
    )
    assert {figures["tiers"][tier] for tier in ("weights", "operator", "layer")} == {f"not judged: {without}"}
    assert figures["finetuned"]["kl"] > 1e-3
    increase = figures["figures"][0]["value"] / figures["finetuned_figures"][0]["value"] - 1
    assert increase > 0
    tight = parity(package, llama, "--no-padding", "--max-perplexity-increase", increase / 2)
    assert tight.exit_code == 1
    assert f"language: perplexity {figures['figures'][0]['value']:.4f} is {increase:+.2%} ± " in tight.stderr


def test_our_own_package_runs_every_tier(own_package: Path, mixture_checkpoint: Path) -> None:
    result = parity(own_package, mixture_checkpoint)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split() for line in lines if line.endswith("  passed")] == [
        [tier, "passed"] for tier in ("weights", "operator", "layer", "logits", "language", "routing", "files")
    ]
    assert lines[0].startswith(f"{CPU}, onnxruntime ")
    assert lines[-1] == "parity passed"


@pytest.mark.gpu
def test_our_own_package_is_its_checkpoint_on_cuda_too(
    own_package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    if not is_at_hand(CUDA):
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    result = parity(own_package, mixture_checkpoint, "--json", tmp_path / "parity.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["providers"][CUDA]
    assert figures["limits"]["logits"]["value"] == 1e-3  # products may round to TF32


def test_a_quantized_package_with_its_twin_is_held_to_it(mixture_checkpoint: Path, tmp_path: Path) -> None:
    package = export(mixture_checkpoint, tmp_path, "int8")
    options = ("--max-perplexity-increase", 0.5, "--json", tmp_path / "parity.json")
    assert parity(package, mixture_checkpoint, "--twin", tmp_path / "twin", *options).exit_code == 0
    tiers = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["providers"][CPU]["tiers"]
    assert {tier for tier, verdict in tiers.items() if verdict != "passed"} == {"task"}


@pytest.mark.parametrize(
    ("variant", "activation_bits", "rounds"),
    [
        ("float32", 32, False),
        ("bfloat16", 32, False),
        ("float16", 32, True),
        ("int8", 32, False),
        ("int8", 8, True),
        ("int4", 32, False),
        ("int4", 8, True),
    ],
)
def test_the_precision_is_read_from_the_graph(
    mixture_checkpoint: Path, tmp_path: Path, variant: Variant, activation_bits: int, rounds: bool
) -> None:
    assert find_precision(export(mixture_checkpoint, tmp_path, variant, activation_bits)) == Precision(
        variant, rounds, has_experts=True
    )


# What a user can mend is one line.


def refusal(result: Result) -> str:
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip()


def test_a_text_that_is_not_there_is_one_line(own_package: Path, mixture_checkpoint: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.txt"
    assert (
        refusal(parity(own_package, mixture_checkpoint, text=nowhere))
        == f"{nowhere}: no such file; --data must be a text file in UTF-8"
    )


def test_a_text_that_is_too_short_is_one_line(own_package: Path, mixture_checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words", encoding="utf-8")
    message = f"{short}: fewer tokens than one block of 48; give more text or a smaller block size"
    assert refusal(parity(own_package, mixture_checkpoint, text=short)) == message


def test_a_directory_without_a_package_or_a_checkpoint_is_one_line(
    own_package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    assert (
        refusal(parity(tmp_path, mixture_checkpoint))
        == f"{tmp_path}: no {MODEL_NAME}; it must be an ONNX package, as `dense2moe run` writes it"
    )
    message = f"{tmp_path}: no config.json; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
    assert refusal(parity(own_package, tmp_path)) == message


def test_other_names_of_inputs_are_one_line(own_package: Path, mixture_checkpoint: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(own_package, package)
    proto = onnx.load(package / MODEL_NAME, load_external_data=False)
    for node in proto.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    proto.graph.input[0].name = "tokens"
    onnx.save(proto, package / MODEL_NAME)
    message = refusal(parity(package, mixture_checkpoint))
    assert message.startswith(f"{package / MODEL_NAME}: lacks input_ids; a decoder takes input_ids, attention_mask,")


# Where nodes run.


def test_nodes_left_to_the_cpu_are_counted(own_package: Path) -> None:
    """The Azure provider is in every CPU wheel and has no kernel at all.

    Whatever is asked of it the CPU does, without a word.
    """
    found = find_placement(own_package, CPU)
    assert set(found) == {CPU}
    assert count_elsewhere(found, CPU) == 0
    graph = onnx.load(own_package / MODEL_NAME, load_external_data=False).graph
    assert found[CPU]["GroupQueryAttention"] == sum(node.op_type == "GroupQueryAttention" for node in graph.node)
    azure = "AzureExecutionProvider"
    if not is_at_hand(azure):
        pytest.skip(f"{azure} is not in this onnxruntime")
    asked = find_placement(own_package, azure)
    assert asked == found
    assert count_elsewhere(asked, azure) == sum(found[CPU].values())


@pytest.mark.gpu
def test_on_cuda_only_shapes_are_left_to_the_cpu(own_package: Path) -> None:
    if not is_at_hand(CUDA):
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    found = find_placement(own_package, CUDA)
    heavy = {"MatMul", "MoE", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
    assert heavy & set(found[CUDA])
    assert not heavy & set(found.get(CPU, {}))


# The fixture in a user's own tests.

TEST_FILE = """
def test_the_package_is_the_model(assert_parity):
    parity = assert_parity({package!r}, reference={reference!r}, data={text!r}, block_size=48, num_blocks=3{limits})
    assert parity.passed
"""


def run_user_test(pytester: pytest.Pytester, package: Path, reference: Path, limits: str = "") -> pytest.RunResult:
    pytester.makepyfile(TEST_FILE.format(package=str(package), reference=str(reference), text=str(TEXT), limits=limits))
    return pytester.runpytest_inprocess(
        "-p", "no:dense2moe", "-p", "dense2moe.convert.pytest_plugin", "-p", "no:cacheprovider"
    )


def test_a_user_s_own_test_passes(pytester: pytest.Pytester, own_package: Path, mixture_checkpoint: Path) -> None:
    run_user_test(pytester, own_package, mixture_checkpoint).assert_outcomes(passed=1)


def test_a_user_s_own_test_fails_with_a_line_for_each_limit(
    pytester: pytest.Pytester, own_package: Path, mixture_checkpoint: Path
) -> None:
    result = run_user_test(pytester, own_package, mixture_checkpoint, ", noise_blocks=0, max_relative_error=1e-9")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"{own_package} is not {mixture_checkpoint}:",
            f"{CPU}: operator: layer 0, *on the graph's own input*",
            f"{CPU}: logits: prefill*",
        ]
    )


def test_pytest_finds_the_fixture_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"dense2moe": "dense2moe.convert.pytest_plugin"}
    import dense2moe.convert.pytest_plugin as plugin

    assert hasattr(plugin, "assert_parity")


def test_the_plugin_costs_no_slow_import() -> None:
    script = (
        "import sys, dense2moe.convert.pytest_plugin; print([name for name in ('torch', 'transformers', "
        "'onnxruntime') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout == "[]\n"
