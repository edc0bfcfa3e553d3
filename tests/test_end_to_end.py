"""The whole road: a run, its reuse, its resumption after kill -9 in every stage.

And the embedded model through every variant.
"""

import hashlib
import json
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from programs import dense2moe, fork, launch, run_command, run_elastic, run_limited, run_until_killed, stages_here, wait
from safetensors.torch import load_file
from shapes import each_shape
from told import tells
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense2moe.convert.artifact.locking import lock
from dense2moe.upcycle.data import python_docs

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "recipes" / "models" / "python-docs-1m"
STORIES = ROOT.parent / "shared" / "data" / "stories260k"
TINYSTORIES = ROOT.parent / "shared" / "data" / "tinystories"
STAGES = ("source", "data", "upcycle", "finetune", "quantize-float32", "onnx-float32", "parity-float32", "report")

RECIPE = """\
source: {source}
data:
  source: {{kind: text, train: ["{text}"], separator: {separator}}}
  block_size: {block_size}
  max_train_tokens: {train_tokens}
  max_validation_tokens: 512
  max_test_tokens: {test_tokens}
upcycle: {{num_experts: {num_experts}, num_experts_per_tok: {k}, layers: {layers}}}
finetune: {{steps: {steps}, eval_steps: {steps}, warmup_steps: 1, batch_size: 4, control: {control}}}
variants: [{variants}]
quantize: {{block_size: 16}}
parity: {{num_blocks: 4, decode_steps: 8}}
export: {{lowering: {lowering}}}
"""


def write_recipe(path: Path, **fields: object) -> Path:
    defaults = {
        "separator": '"\\n\\n"',
        "block_size": 32,
        "train_tokens": 16384,
        "test_tokens": 2048,
        "num_experts": 4,
        "k": 2,
        "layers": "all",
        "steps": 3,
        "control": "true",
        "variants": "float32",
        "lowering": "grouped",  # which is fastest here is asked where a test says auto
    }
    path.write_text(RECIPE.format(**(defaults | fields)), encoding="utf-8")
    return path


def succeed(*arguments: object) -> str:
    finished = dense2moe(*arguments)
    assert finished.exit_code == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module", autouse=True)
def _stages_here():
    """Only what is forked, launched or started as a program has processes for its stages, and pictures in its report.

    Those are a third of a report's time at least, and the same in every run.
    """
    with stages_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])
        yield


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory, dense_checkpoint):
    folder = tmp_path_factory.mktemp("tiny")
    return write_recipe(folder / "tiny.yaml", source=dense_checkpoint, text=ROOT / "upcycle" / "*" / "*.py")


@pytest.fixture(scope="module")
def killed_run(tiny_recipe):
    """A work directory whose run was killed by SIGKILL once in the middle of each stage, and then finished.

    And what each left unfinished.
    """
    workdir, said = tiny_recipe.parent / "killed", tiny_recipe.parent / "said.txt"
    command = ["run", str(tiny_recipe), "--workdir", str(workdir)]
    partials = {}
    for stage in STAGES:
        ended = wait(fork(run_until_killed, command, workdir, stage, said=said))
        assert ended == -signal.SIGKILL, f"{stage}: {ended}: {said.read_text(encoding='utf-8')}"
        partials[stage] = [path.name for path in workdir.glob("*.partial")]
    assert wait(fork(run_command, command, said=said)) == 0, said.read_text(encoding="utf-8")
    return workdir, partials


def test_a_run_killed_in_every_stage_finishes_and_verifies(killed_run):
    workdir, partials = killed_run
    for stage in STAGES:
        (left,) = partials[stage]
        assert left.startswith(f"{stage}-")
    assert succeed("verify", workdir).endswith("8 artifacts, every file as its manifest says\n")
    assert not list(workdir.glob("*.partial"))


def test_a_killed_run_gives_the_weights_of_an_unbroken_one(killed_run, tiny_recipe):
    unbroken = tiny_recipe.parent / "unbroken"
    succeed("run", tiny_recipe, "--workdir", unbroken, "--until", "finetune")
    digests = []
    for workdir in (killed_run[0], unbroken):
        manifest = json.loads(next(workdir.glob("finetune-*/manifest.json")).read_text(encoding="utf-8"))
        digests.append(manifest["files"]["model.safetensors"]["sha256"])
    assert digests[0] == digests[1]


def test_the_history_is_a_file_and_in_the_report_and_in_no_manifest(killed_run):
    workdir, _ = killed_run
    for path in workdir.glob("*/manifest.json"):
        assert "history" not in json.loads(path.read_text(encoding="utf-8"))["facts"].get("finetune", {})
    (tuned,) = workdir.glob("finetune-*")
    assert "history" not in json.loads((tuned / "manifest.json").read_text(encoding="utf-8"))["facts"]
    lines = [json.loads(line) for line in (tuned / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines
    assert (
        json.loads(next(workdir.glob("report-*/report.json")).read_text(encoding="utf-8"))["finetune"]["history"]
        == lines
    )


def test_the_report_of_a_run_is_as_its_schema_says_and_nothing_in_it_is_undocumented(killed_run):
    schema = json.loads((ROOT / "recipes" / "report.schema.json").read_text(encoding="utf-8"))
    for name, record in schema["$defs"].items():
        if "properties" in record and name != "DataFacts":  # whose source tells more of itself
            record["additionalProperties"] = False
    report = json.loads(next(killed_run[0].glob("report-*/report.json")).read_text(encoding="utf-8"))
    errors = Draft202012Validator(schema | {"additionalProperties": False}).iter_errors(report)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_the_package_of_a_run_comes_with_its_card(killed_run, tmp_path):
    workdir, output = killed_run[0], tmp_path / "out"
    assert "README.md" in succeed("package", workdir, output)
    card = (output / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((output / "model.onnx_data").read_bytes()).hexdigest()
    assert f"| SHA-256 of model.onnx_data | `{digest}` |" in card
    assert "**Parity passed**" in card


def test_a_run_with_fine_tuning_switched_off_exports_what_upcycling_made(killed_run, dense_checkpoint, tmp_path):
    recipe = write_recipe(
        tmp_path / "off.yaml", source=dense_checkpoint, text=ROOT / "upcycle" / "*" / "*.py", variants="float32, int8"
    )
    lines = [
        line if not line.startswith("finetune:") else "finetune: null"
        for line in recipe.read_text(encoding="utf-8").splitlines()
    ]
    # on all text, as the torch models are measured
    text = "\n".join(lines).replace("num_blocks: 4, ", "language_tokens: 1000000, ")
    recipe.write_text(f"{text}\n", encoding="utf-8")
    workdir = tmp_path / "off"
    told = succeed("run", recipe, "--workdir", workdir)
    assert "Fine-tuning was switched off" in told
    assert "fine-tuned" not in told
    assert succeed("verify", workdir).endswith("11 artifacts, every file as its manifest says\n")
    assert not list(workdir.glob("finetune-*/*.safetensors"))
    ours, theirs = (
        load_file(next(workdir.glob(f"{stage}-*/model.safetensors"))) for stage in ("quantize-float32", "upcycle")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    report = json.loads(next(workdir.glob("report-*/report.json")).read_text(encoding="utf-8"))
    assert [row["name"] for row in report["summary"]] == ["dense", "upcycled", "ONNX float32", "ONNX int8"]
    upcycled = report["finetune"]["evaluations"]["upcycled"]["figures"][0]["value"]
    assert report["variants"]["float32"]["parity"]["providers"]["CPUExecutionProvider"]["figures"][0][
        "value"
    ] == pytest.approx(upcycled, rel=1e-4)
    Draft202012Validator(json.loads((ROOT / "recipes" / "report.schema.json").read_text(encoding="utf-8"))).validate(
        report
    )
    page = next(workdir.glob("report-*/report.html")).read_text(encoding="utf-8")
    assert "fine-tuned" not in page
    assert "Agreement is with the upcycled torch model" in page
    assert succeed("show", workdir)
    assert "finetune" in succeed("compare", killed_run[0], workdir)
    succeed("package", workdir, tmp_path / "out", "--variant", "int8")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "sparse upcycling without training" in card
    assert "fine-tune" not in card.partition("## Recipe")[0]


def losses_of(workdir: Path) -> dict[str, float]:
    """Of each model; not of the control of equal compute, whose steps are measured."""
    evaluations = facts_of(workdir, "finetune")["evaluations"]
    return {name: found["loss"] for name, found in evaluations.items() if name != "dense, same FLOPs"}


def test_two_processes_share_the_fine_tuning_of_one_run(killed_run, tiny_recipe, tmp_path):
    """As torchrun starts them."""
    workdir, said = tmp_path / "shared", tmp_path / "said.txt"
    command = ["run", str(tiny_recipe), "--workdir", str(workdir)]
    ended = wait(fork(run_elastic, 2, command, said, said=tmp_path / "launcher.txt"))
    assert ended == 0, (tmp_path / "launcher.txt").read_text(encoding="utf-8") + said.read_text(encoding="utf-8")
    assert said.read_text(encoding="utf-8").count("report: ") == 1
    assert succeed("verify", workdir).endswith("8 artifacts, every file as its manifest says\n")
    assert not list(workdir.glob("*.resume"))
    # sums in another order, and three steps
    assert losses_of(workdir) == pytest.approx(losses_of(killed_run[0]), rel=1e-4)


def test_two_processes_with_parts_of_the_model_share_the_fine_tuning_of_one_run(killed_run, tiny_recipe, tmp_path):
    workdir, said = tmp_path / "shared", tmp_path / "said.txt"
    arguments = ["run", str(tiny_recipe), "--workdir", str(workdir), "--until", "finetune"]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    codes = launch(2, run_command, arguments, said=said, environment=fsdp)
    assert codes == [0, 0], said.read_text(encoding="utf-8")
    assert succeed("verify", workdir).endswith("4 artifacts, every file as its manifest says\n")
    assert not list(workdir.glob("*.resume"))
    assert losses_of(workdir) == pytest.approx(losses_of(killed_run[0]), rel=1e-4)


def test_a_second_run_reuses_everything(killed_run, tiny_recipe):
    finished = dense2moe("run", tiny_recipe, "--workdir", killed_run[0])
    assert finished.exit_code == 0
    assert finished.stderr.splitlines() == [f"· {stage}  reused" for stage in STAGES]


def test_a_changed_recipe_makes_new_artifacts_beside_the_old(killed_run, tiny_recipe, tmp_path):
    workdir = killed_run[0]
    before = {path.name for path in workdir.iterdir()}
    changed = tmp_path / tiny_recipe.name
    text = tiny_recipe.read_text(encoding="utf-8").replace("lowering: grouped", "lowering: auto")
    changed.write_text(text, encoding="utf-8")
    finished = dense2moe("run", changed, "--workdir", workdir)
    assert finished.exit_code == 0
    made = [line for line in finished.stderr.splitlines() if line.startswith("✓")]
    assert [line.split()[1] for line in made] == ["onnx-float32", "parity-float32", "report"]
    assert before < {path.name for path in workdir.iterdir()}


def test_bfloat16_and_static_8_bits_go_the_whole_road(killed_run, tiny_recipe, tmp_path):
    workdir = killed_run[0]
    recipe = tmp_path / tiny_recipe.name
    text = tiny_recipe.read_text(encoding="utf-8").replace("variants: [float32]", "variants: [bfloat16, int8-qdq]")
    # What 8 bits cost a random model says nothing; the limit is wide, and the package must agree with its twin all the
    # same.
    limits = "parity: {max_perplexity_increase: {bfloat16: 0.01, int8-qdq: 0.5}, "
    recipe.write_text(text.replace("parity: {", limits), encoding="utf-8")
    planned = succeed("plan", recipe, "--workdir", workdir)
    assert "onnx-bfloat16" in planned
    assert "onnx-int8-qdq" in planned
    stdout = succeed("run", recipe, "--workdir", workdir)
    assert stdout.count("parity passed") == 2
    sizes = {
        variant: facts_of(workdir, f"onnx-{variant}")["package_bytes"]
        for variant in ("float32", "bfloat16", "int8-qdq")
    }
    assert sizes["int8-qdq"] < sizes["bfloat16"] < sizes["float32"]
    facts = facts_of(workdir, "quantize-int8-qdq")
    assert (facts["quantized_expert_share"], facts["block_size"], facts["method"]) == (1.0, None, "round")
    checks = facts_of(workdir, "parity-bfloat16")["providers"]["CPUExecutionProvider"]["checks"]
    assert max(check["relative_error"] for check in checks) < 1e-5  # float32 sums in another order
    (page,) = (path for path in workdir.glob("report-*/report.html") if "int8-qdq" in path.read_text(encoding="utf-8"))
    assert "ONNX bfloat16" in page.read_text(encoding="utf-8")


def test_a_second_run_in_one_work_directory_is_refused(tiny_recipe, tmp_path):
    workdir = tmp_path / "two"
    with lock(workdir):
        second = dense2moe("run", tiny_recipe, "--workdir", workdir)
    assert second.exit_code == 1
    assert tells(second.stderr, f"Error: {workdir}", os.getpid(), "--workdir")
    assert {path.name for path in workdir.iterdir()} == {".lock"}


def test_a_broken_threshold_fails_the_run_after_the_report(killed_run, tiny_recipe, tmp_path):
    strict = tmp_path / tiny_recipe.name
    text = tiny_recipe.read_text(encoding="utf-8").replace("parity: {", "parity: {max_relative_error: 1.0e-12, ")
    strict.write_text(text, encoding="utf-8")
    finished = dense2moe("run", strict, "--workdir", killed_run[0])
    assert finished.exit_code == 1
    assert "Error: parity was broken:\nfloat32: CPUExecutionProvider: operator: layer 0, " in finished.stderr
    assert "worst layer" in finished.stderr
    assert "report: " in finished.stdout


def test_a_file_size_limit_is_one_line_and_leaves_nothing_half_made(tiny_recipe, tmp_path):
    workdir, said = tiny_recipe.parent / "limited", tmp_path / "said.txt"
    command = ["run", str(tiny_recipe), "--workdir", str(workdir)]
    assert wait(fork(run_limited, command, 65_536, said=said)) == 1, said.read_text(encoding="utf-8")
    lines = [line for line in said.read_text(encoding="utf-8").splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert "a file grew past the largest size allowed" in lines[0]
    assert not list(workdir.glob("*.partial"))


def test_verify_names_a_flipped_byte(killed_run, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(next(killed_run[0].glob("onnx-float32-*")), package)
    data = bytearray((package / "model.onnx_data").read_bytes())
    data[100] ^= 1
    (package / "model.onnx_data").write_bytes(data)
    finished = dense2moe("verify", package)
    assert finished.exit_code == 1
    assert finished.stderr.startswith(f"Error: {package}: model.onnx_data: SHA-256")


def write_family_recipe(folder: Path, name: str, source: Path, **fields: object) -> Path:
    return write_recipe(folder / f"{name}.yaml", source=source, text=ROOT / "upcycle" / "*" / "*.py", **fields)


def facts_of(workdir: Path, label: str) -> dict:
    return json.loads(next(workdir.glob(f"{label}-*/manifest.json")).read_text(encoding="utf-8"))["facts"]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
# Blocks are of 32 tokens, and the last eight of them are decoded: the factors switch while decoding.
LONGROPE_IN_STEPS = {"original_max_position_embeddings": 28, "rope_parameters": LONGROPE}
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, "num_hidden_layers": 4}, "every-2", "Qwen3MoeForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM", {}, "all", "Qwen2MoeForCausalLM"),
    "mistral": ("MistralForCausalLM", {"sliding_window": 24}, "all", "MixtralForCausalLM"),
    "longrope": ("Phi3ForCausalLM", LONGROPE_IN_STEPS, "all", "MixtralForCausalLM"),
    "llama, a selection bias": ("LlamaForCausalLM", {"num_hidden_layers": 4}, "last-half", "Glm4MoeForCausalLM"),
}


@pytest.mark.parametrize("name", each_shape(FAMILIES, {"qwen3", "longrope", "llama, a selection bias"}))
def test_every_kind_of_decoder_runs_through_to_parity(name, make_dense, tmp_path):
    architecture, overrides, layers, target = FAMILIES[name]
    source = make_dense(architecture=architecture, **overrides)
    fields = {"layers": layers, "variants": "float32, int8", "control": str(name == "qwen3").lower()}
    recipe, workdir = write_family_recipe(tmp_path, name, source, **fields), tmp_path / "work"
    # Is the export right? Exact activations leave no rounding to hide behind. What 8 bits cost a random model of width
    # 32, on a text that is this package's own source, says nothing and changes with every commit, so the limit on
    # perplexity is wide here.
    text = recipe.read_text(encoding="utf-8").replace(
        "parity: {", "parity: {max_perplexity_increase: {float32: 1.0e-4, int8: 0.05}, "
    )
    if biased := target == "Glm4MoeForCausalLM":
        text = text.replace("upcycle: {", "upcycle: {target: glm4_moe, ").replace(
            "finetune: {", "finetune: {bias_update_rate: 0.05, "
        )
    recipe.write_text(text.replace("export: {", "export: {activation_bits: 32, "), encoding="utf-8")
    succeed("run", recipe, "--workdir", workdir, "--until", "parity")
    facts = facts_of(workdir, "upcycle")
    assert facts["target"] == target
    assert facts["keeps_function"]
    assert facts["num_sparse_layers"] == (facts["num_layers"] if layers == "all" else 2)
    assert all(line["bitwise"] for line in facts["receipt"] if line["bitwise_due"])
    parity = facts_of(workdir, "parity-float32")["providers"]["CPUExecutionProvider"]
    assert len(parity["twin"]["routing_agreement"]) == facts["num_layers"]
    for variant in ("float32", "int8"):
        judged = facts_of(workdir, f"parity-{variant}")
        assert judged["passed"]
        checks = judged["providers"]["CPUExecutionProvider"]["checks"]
        assert max(check["relative_error"] for check in checks) < 1e-5  # float32 sums in another order
    finetuned = next(workdir.glob("finetune-*"))
    tuned = json.loads((finetuned / "config.json").read_text(encoding="utf-8"))
    count = {"MixtralForCausalLM": "num_local_experts", "Glm4MoeForCausalLM": "n_routed_experts"}.get(
        target, "num_experts"
    )
    assert tuned[count] == 4  # under the name that other readers look for
    biases = [
        tensor
        for name, tensor in load_file(finetuned / "model.safetensors").items()
        if name.endswith("e_score_correction_bias")
    ]
    assert [bool(bias.any()) for bias in biases] == [True, True] * biased


TO_COME = {
    "t5": (
        "T5ForConditionalGeneration",
        {},
        1,
        "upcycle",
        "SwitchTransformersForConditionalGeneration is no decoder",
    ),
}


def test_more_last_layers_than_there_are_is_told_before_any_work(make_dense, tmp_path):
    recipe = write_family_recipe(tmp_path, "last", make_dense())
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("finetune: {", "finetune: {train: last-3, "), encoding="utf-8"
    )
    checked = dense2moe("check", recipe)
    assert (checked.exit_code, checked.stderr) == (
        1,
        f"Error: {recipe}:9: finetune.train is last-3; it must be at most last-2, the layers of the model\n",
    )


def test_a_learned_prompt_is_trained_and_goes_no_further(make_dense, tmp_path):
    recipe = write_family_recipe(tmp_path, "prompt", make_dense())
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("finetune: {", "finetune: {train: prompt, "), encoding="utf-8"
    )
    workdir = tmp_path / "work"
    whole = dense2moe("run", recipe, "--workdir", workdir)
    reason = "a learned prompt cannot be exported to ONNX; it lies beside the model as a peft adapter"
    assert whole.exit_code == 1
    assert tells(whole.stderr, f"Error: {recipe}", reason, "--until finetune")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("block_size: 32", "block_size: 250"), encoding="utf-8")
    assert tells(dense2moe("check", recipe).stderr, f"Error: {recipe}:9: finetune.prompt_tokens", 16, 250, 256)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("block_size: 250", "block_size: 32"), encoding="utf-8")
    succeed("run", recipe, "--workdir", workdir, "--until", "finetune")
    assert next(workdir.glob("finetune-*/prompt/adapter_model.safetensors")).is_file()
    assert succeed("verify", workdir).endswith("4 artifacts, every file as its manifest says\n")


@pytest.mark.parametrize("name", TO_COME)
def test_a_target_without_a_graph_builder_goes_as_far_as_it_can_and_says_so(name, make_dense, tmp_path):
    architecture, overrides, k, last, reason = TO_COME[name]
    recipe = write_family_recipe(tmp_path, name, make_dense(architecture=architecture, **overrides), k=k)
    workdir = tmp_path / "work"
    whole = dense2moe("run", recipe, "--workdir", workdir)
    assert whole.exit_code == 1
    assert tells(whole.stderr, f"Error: {recipe}: {reason}", f"run it with --until {last}")
    assert not workdir.exists()
    succeed("run", recipe, "--workdir", workdir, "--until", last)
    assert facts_of(workdir, "upcycle")["receipt"]
    assert list(workdir.glob(f"{last}-*"))


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory):
    """The embedded checkpoint through every variant.

    With a few steps of training on the interpreter's own documentation, of which a part is read.
    """
    read_library = python_docs._library
    folder = tmp_path_factory.mktemp("embedded")
    recipe = write_recipe(
        folder / "embedded.yaml",
        source=EMBEDDED,
        text="unused",
        block_size=64,
        steps=4,
        variants="float32, float16, int8, int4",
        lowering="fused",
    )
    text = recipe.read_text(encoding="utf-8")
    data = 'source: {kind: text, train: ["unused"], separator: "\\n\\n"}'
    assert data in text
    recipe.write_text(text.replace(data, "source: {kind: python-docs}"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "_library", lambda: islice(read_library(), 100))
        stdout = succeed("run", recipe, "--workdir", folder / "work")
    report = json.loads(next((folder / "work").glob("report-*/report.json")).read_text(encoding="utf-8"))
    return folder / "work", report, stdout


def test_upcycling_keeps_the_perplexity_to_four_digits(embedded_run):
    evaluations = embedded_run[1]["finetune"]["evaluations"]
    assert f"{evaluations['upcycled']['figures'][0]['value']:.4g}" == (
        f"{evaluations['dense']['figures'][0]['value']:.4g}"
    )
    assert evaluations["upcycled"]["same"]["num_blocks"] == 4
    assert evaluations["upcycled"]["same"]["difference"] < 1e-5


@pytest.mark.parametrize(("variant", "limit"), [("float32", 1e-4), ("float16", 5e-4), ("int8", 0.005), ("int4", 0.05)])
def test_a_variant_keeps_the_perplexity_within_its_limit(embedded_run, variant, limit):
    """The limits: int8 within 0.5 % of float32, int4 within 5 %.

    Float16 is held to its default, 50 times what was measured.
    """
    parity = embedded_run[1]["variants"][variant]["parity"]["providers"]["CPUExecutionProvider"]
    assert parity["figures"][0]["value"] / parity["finetuned_figures"][0]["value"] - 1 < limit


def test_the_manifest_says_that_every_expert_is_quantized(embedded_run):
    for variant in ("int8", "int4"):
        manifest = json.loads(
            next(embedded_run[0].glob(f"quantize-{variant}-*/manifest.json")).read_text(encoding="utf-8")
        )
        assert manifest["facts"]["quantized_expert_share"] == 1.0
        assert manifest["facts"]["bits"]["router"] == 32


def test_the_manifest_of_the_data_names_interpreter_and_digest(embedded_run):
    manifest = json.loads(next(embedded_run[0].glob("data-*/manifest.json")).read_text(encoding="utf-8"))
    assert manifest["facts"]["interpreter"].startswith("CPython 3.")
    assert len(manifest["facts"]["digest"]) == 64


def test_the_table_has_a_row_for_every_model(embedded_run):
    for row in ("dense", "upcycled", "dense continued", "fine-tuned", "float32", "float16", "int8", "int4"):
        assert row in embedded_run[2]


def test_greedy_tokens_of_genai_are_those_of_transformers(embedded_run):
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    package = next(embedded_run[0].glob("onnx-float32-*"))
    reference = AutoModelForCausalLM.from_pretrained(next(embedded_run[0].glob("finetune-*")), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package)
    model = og.Model(str(package))
    for prompt in ("The for statement", "Return a", "class ", "import os\n", "def main("):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + 64, do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(ids)
        found = []
        while not generator.is_done() and len(found) < 64:
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        with torch.no_grad():
            expected = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[
                0, len(ids) :
            ].tolist()
        assert found == expected


@pytest.mark.data
def test_stories260k_tells_the_story_that_the_dense_model_tells(tmp_path):
    """Its FFN width 172 is divided by no block size; it is padded, and quantized whole."""
    if not STORIES.exists():
        pytest.skip(f"no {STORIES}")
    text = TINYSTORIES / "train.txt"
    recipe = write_recipe(
        tmp_path / "stories.yaml",
        source=STORIES,
        text=text,
        separator='"<|endoftext|>"',
        block_size=128,
        steps=4,
        control="false",
        variants="int8",
    )
    succeed("run", recipe, "--workdir", tmp_path / "work", "--until", "parity")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    dense = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    ids = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = tokenizer.decode(
            dense.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True
        )
    package = next((tmp_path / "work").glob("onnx-int8-*"))
    story = succeed("generate", package, "--prompt", "Once upon a time", "--max-new-tokens", "60")
    assert story.startswith(expected[:60])
    facts = json.loads(next((tmp_path / "work").glob("quantize-int8-*/manifest.json")).read_text(encoding="utf-8"))[
        "facts"
    ]
    assert facts["quantized_expert_share"] == 1.0
