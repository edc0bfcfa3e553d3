"""Recipes of families that are traced: an encoder, and a decoder with Conv1D weights, go the whole road."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from hosts import ROWS
from programs import dense2moe, stages_here
from test_end_to_end import write_recipe
from test_snippets import Release
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from dense2moe.export.storage import find_graph

pytest.importorskip("onnxscript")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """A finished run of a tiny model."""

    folder: Path
    recipe: Path
    output: str

    def artifact(self, stage: str) -> Path:
        (found,) = self.folder.glob(f"{stage}-*")
        return found

    @property
    def facts(self) -> dict:
        return json.loads((self.artifact("report") / "report.json").read_text(encoding="utf-8"))

    def release(self, variant: str) -> Release:
        card = (self.artifact("report") / "cards" / variant / "README.md").read_text(encoding="utf-8")
        return Release(card, self.artifact(f"onnx-{variant}"), self.folder, 0, "")


def make_gpt2(size: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64))


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def make_bert(size: int) -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=64, **BERT))


def save_source(model: PreTrainedModel, tokenizer_of: Path, folder: Path) -> None:
    """A model, and a tokenizer with what masking needs."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "pad_token": "[PAD]"})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=[(make_bert, "int8"), (make_gpt2, "float32, int8")], ids=["bert", "gpt2"])
def run(request: pytest.FixtureRequest, dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("host")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    make, variants = request.param
    save_source(make(len(tokenizer) + 2), dense_checkpoint, folder / "source")
    text = ROOT / "upcycle" / "*" / "*.py"
    recipe = write_recipe(folder / "tiny.yaml", source=folder / "source", text=text, variants=variants)
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", folder / "run")
    assert finished.exit_code == 0, finished.stderr
    return Run(folder / "run", recipe, finished.stdout)


def test_a_run_passes_parity_in_every_variant_that_it_wrote(run: Run) -> None:
    for found in run.facts["variants"].values():
        parity = found["parity"]["providers"]["CPUExecutionProvider"]
        assert found["parity"]["passed"], run.output
        assert parity["tiers"].keys() >= {"weights", "layer", "logits", "language", "files"}
        assert {parity["tiers"][tier] for tier in ("weights", "layer", "logits", "language", "files")} == {"passed"}
        assert {place["layer"] for place in parity["places"]} >= {0, 1}
        assert parity["figures"][0]["value"] == pytest.approx(parity["finetuned_figures"][0]["value"], rel=0.05)


def test_figures_are_those_of_the_task(run: Run) -> None:
    dense = run.facts["finetune"]["evaluations"]["dense"]
    measured = run.facts["variants"]["int8"]["parity"]["providers"]["CPUExecutionProvider"]
    reads_in_one_pass = dense["figures"][0]["name"] == "masked perplexity"
    assert (dense["decode_tokens_per_second"] is None) == reads_in_one_pass
    assert (measured["decode_tokens_per_second"] is None) == reads_in_one_pass
    assert ("it reads" in run.output, "it decodes" in run.output) == (reads_in_one_pass, not reads_in_one_pass)


def test_the_code_of_the_card_runs_as_it_stands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if "float32" in run.facts["variants"]:
        release = run.release("float32")
        assert release.generate(monkeypatch) == release.execute("transformers", monkeypatch)
        return
    release = run.release("int8")
    assert "pipeline_tag: fill-mask" in release.card
    tokenizer = AutoTokenizer.from_pretrained(release.package)
    words = {tokenizer.decode(token) for token in range(len(tokenizer))}
    for library in ("onnxruntime\n", "transformers"):
        assert release.execute(library, monkeypatch).removesuffix("\n") in words


def test_bench_and_generate_know_what_a_package_can_do(run: Run) -> None:
    package = run.artifact("onnx-int8")
    timed = dense2moe("bench", package, "--prompt", "8", "--new", "2", "--batch", "1,2", "--rounds", "1", "--json")
    written = dense2moe("generate", package, "--prompt", "a", "--max-new-tokens", "1")
    loads = json.loads(timed.stdout)["loads"]
    assert len(loads) == 2
    if "rows_per_second" in loads[0]:
        assert all(load["tokens_per_second"]["median"] > load["rows_per_second"]["median"] > 0 for load in loads)
        assert "ms a pass" in dense2moe("bench", package, "--prompt", "8", "--rounds", "1").stdout
        assert "context holds 64" in dense2moe("bench", package, "--prompt", "65").stderr
        assert re.search(r"model\.onnx: has no cache .* continues no text; give a decoder's package", written.stderr)
    else:
        assert written.exit_code == 0
        assert all(load["decode_tokens_per_second"]["median"] > 0 for load in loads)


def test_another_epsilon_is_named_in_its_layer(run: Run, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(run.artifact("onnx-int8"), package)
    model = onnx.load(find_graph(package), load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    (epsilon,) = (each for each in norms[-2].attribute if each.name == "epsilon")
    epsilon.f = 1e-2
    onnx.save(model, find_graph(package))
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    checkpoints = ("--reference", run.artifact("finetune"), "--twin", run.artifact("quantize-int8"))
    finished = dense2moe("parity", package, *checkpoints, "--data", text, "--block-size", "32", "--blocks", "2")
    assert finished.exit_code == 1
    assert re.search(r"layer: .*layer 1\b", finished.stderr), finished.stderr


def list_text_hosts() -> list[str]:
    """Families that predict the next token or masked tokens."""
    heads = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
    return [name for name, row in ROWS.items() if row.architecture.endswith(heads)]


PER_LAYER = "vocab_size_per_layer_input"
BROKEN = {
    "xglm": "transformers does not compute it in float64, which noise is measured by",
}
"""Families that end in a false alarm or in an error of others."""
REFUSED = {
    "albert": "share their weights",
    "apertus": "XIELUActivation",
    "deberta": "rel_embeddings",
    "deberta-v2": "is used twice in one forward",
    "ernie4_5": "use_bias is True",
    "eurobert": "reads in both directions",
    "granite": "mlp_bias is True",
    "lfm2": "keeps a cache of LinearAttentionLayer",
    "llama": "mlp_bias is True",
    "longformer": "cannot be traced",
    "luke": "norm and experts at once",
    "openai-gpt": "cannot be traced",
}
"""Families that no recipe takes to ONNX, and what it says."""


@pytest.mark.every_family
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=BROKEN[name])) if name in BROKEN else name
        for name in list_text_hosts()
    ],
)
def test_every_family_goes_the_whole_road_or_says_where_it_ends(
    name: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    sizes = {field: len(tokenizer) + 2 for field in ("vocab_size", *(ROWS[name].values.keys() & {PER_LAYER}))}
    save_source(ROWS[name].make(**sizes), dense_checkpoint, tmp_path / "source")
    text = ROOT / "upcycle" / "*" / "*.py"
    recipe = write_recipe(tmp_path / "tiny.yaml", source=tmp_path / "source", text=text, block_size=16)
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    if name in REFUSED:
        assert finished.exit_code == 1
        assert REFUSED[name] in finished.stderr
    else:
        assert finished.exit_code == 0, finished.stderr


def test_a_head_for_the_next_token_that_reads_both_ways_is_not_trained(dense_checkpoint: Path, tmp_path: Path) -> None:
    """It would see what it predicts; with `is_decoder` it is trained, and written with a cache."""
    size = len(AutoTokenizer.from_pretrained(dense_checkpoint)) + 2
    for is_decoder in (False, True):
        folder = tmp_path / str(is_decoder)
        config = BertConfig(vocab_size=size, max_position_embeddings=64, is_decoder=is_decoder, **BERT)
        save_source(BertLMHeadModel(config), dense_checkpoint, folder / "source")
        recipe = write_recipe(folder / "tiny.yaml", source=folder / "source", text=ROOT / "upcycle" / "*" / "*.py")
        checked = dense2moe("check", recipe)
        if is_decoder:
            assert checked.exit_code == 0, checked.stderr
        else:
            assert "MixtureBertLMHeadModel reads in both directions here" in checked.stdout + checked.stderr


def test_a_model_with_a_head_that_is_not_trained_is_upcycled_alone(dense_checkpoint: Path, tmp_path: Path) -> None:
    """What there is no task for ends the road where it ends, said before anything is made."""
    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer) + 2, max_position_embeddings=64, **BERT))
    save_source(model, dense_checkpoint, tmp_path / "source")
    text = ROOT / "upcycle" / "*" / "*.py"
    recipe = write_recipe(tmp_path / "tiny.yaml", source=tmp_path / "source", text=text)
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 1
    assert re.search("BertForSequenceClassification", finished.stderr), finished.stderr
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("upcycle-*"))


def test_a_recipe_of_an_encoder_and_a_decoder_says_where_its_road_ends(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing trains it yet; the Python API writes its package."""
    size = len(AutoTokenizer.from_pretrained(dense_checkpoint)) + 2
    save_source(ROWS["bart"].make(vocab_size=size), dense_checkpoint, tmp_path / "source")
    recipe = write_recipe(tmp_path / "tiny.yaml", source=tmp_path / "source", text=ROOT / "upcycle" / "*" / "*.py")
    checked = dense2moe("check", recipe)
    assert checked.exit_code == 0, checked.stderr
    said = " ".join(checked.stdout.split())
    assert "MixtureBartForConditionalGeneration is for text2text-generation" in said
    assert said.endswith("export_onnx of the Python API take what it writes; run it with --until upcycle")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("variants: [int8-qdq]", "variants: has 'int8-qdq'; mixture_bert is traced"),
        ("variants: [float16]", "a traced graph is float32"),
        ("variants: [int4]\nquantize: {method: gptq}", "quantize.method is 'gptq'; mixture_bert is traced"),
        ("export: {lowering: fused}", "'grouped' computes it"),
    ],
)
def test_what_a_traced_graph_cannot_have_is_said_before_any_work(
    settings: str, said: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    save_source(make_bert(len(AutoTokenizer.from_pretrained(dense_checkpoint)) + 2), dense_checkpoint, tmp_path / "it")
    recipe = tmp_path / "tiny.yaml"
    data = f'data: {{source: {{kind: text, train: ["{ROOT}/upcycle/*/*.py"]}}, block_size: 32, max_test_tokens: 4096}}'
    recipe.write_text(f"source: {tmp_path / 'it'}\n{data}\n{settings}\n", encoding="utf-8")
    finished = dense2moe("check", recipe)
    assert finished.exit_code == 1
    assert said in finished.stderr
