"""What is proved of merged sources, and what is told of them before a byte is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import WINDOW
from fine_tunes import fine_tune, is_ffn
from mixtures import EXACT, MakeDense, load, logits, rel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from dense2moe.api import ExpertsConfig, MergingConfig, RouterConfig, UpcycleConfig, upcycle
from dense2moe.upcycle.building.distance import measure_distances
from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT
from dense2moe.upcycle.building.vocabulary import compare_companions
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")


def two_sources(base: Path, tmp_path: Path, **settings: Any) -> dict[str, Path]:
    return {name: fine_tune(base, tmp_path / name, seed, **settings) for seed, name in enumerate(("code", "maths"))}


def force(model: Any, expert: int) -> None:
    """Give every expert the weights of one."""
    for weight in model.parameters():
        if weight.dim() == 3:
            weight.data[:] = weight.data[expert].clone()


@pytest.mark.usefixtures("receipts_in_float32")
@pytest.mark.parametrize("router", [0.0, 1.0])
def test_a_mixture_forced_to_one_expert_is_its_source_where_the_rest_is_the_base_s(
    router: float, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path, of=is_ffn)
    settings = UpcycleConfig(merging=MergingConfig(method="base"), router=RouterConfig(logit_std=router))
    upcycle(base, tmp_path / "out", settings, sources=sources)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    for expert, source in enumerate(sources.values()):
        model = load(tmp_path / "out")
        force(model, expert)
        with torch.no_grad():
            found, expected = model(input_ids=ids).logits, load(source)(input_ids=ids).logits
        assert rel(found, expected) <= ROUNDING_LIMIT
    assert rel(logits(tmp_path / "out"), logits(base)) > 100 * ROUNDING_LIMIT


@pytest.mark.usefixtures("receipts_in_float32")
def test_a_mistral_s_window_is_kept_of_merged_sources(make_dense: MakeDense, tmp_path: Path) -> None:
    """Where mergekit-moe 0.1.5 sets it to None: past the window each expert alone is still its source."""
    base = make_dense(architecture="MistralForCausalLM", sliding_window=WINDOW, **EXACT)
    sources = two_sources(base, tmp_path, of=is_ffn)
    made = upcycle(base, tmp_path / "out", UpcycleConfig(merging=MergingConfig(method="base")), sources=sources)
    assert made.plan.target_config.sliding_window == WINDOW
    ids = torch.randint(300, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(1))
    model, wide = load(tmp_path / "out"), load(sources["maths"])
    force(model, 1)
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, load(sources["maths"])(input_ids=ids).logits
        wide.config.sliding_window = None
        unwindowed = wide(input_ids=ids).logits
    assert rel(found, expected) <= ROUNDING_LIMIT
    assert rel(unwindowed, expected) > 100 * ROUNDING_LIMIT  # or the text would not cross the window


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "two a source": ({}, {"num_experts": 4}),
    "the base routed": ({}, {"base_expert": "routed"}),
    "the base shared": ({}, {"base_expert": "shared"}),
    "the base shared, silent at first": ({}, {"base_expert": "shared", "shared_expert": "zero"}),
    "granular": ({}, {"experts": ExpertsConfig(kind="granular", granularity=2), "num_experts_per_tok": 2}),
    "some layers": ({}, {"layers": (1,)}),
    "fused": ({"architecture": "Phi3ForCausalLM"}, {}),
    "norms of one and more": (
        {"architecture": "GemmaForCausalLM", "hidden_act": "gelu_pytorch_tanh"},
        {"merging": MergingConfig(method="ties")},
    ),
    "stacked": ({"attention_bias": True}, {"merging": MergingConfig(method="dare")}),
    "heads with norms": ({"architecture": "Qwen3ForCausalLM"}, {"merging": MergingConfig(method="base")}),
    "layer by layer": ({}, {"receipt": "layers"}),
    "layer by layer, with the base's rest": ({}, {"receipt": "layers", "merging": MergingConfig(method="base")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_alone_is_the_dense_layer_with_the_source_s_ffn(
    kind: str, make_dense: MakeDense, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fields, settings = KINDS[kind]
    if kind not in ("plain", "stacked", "layer by layer"):
        request.getfixturevalue("receipts_in_float32")
    base = make_dense(**EXACT, **fields)
    made = upcycle(base, tmp_path / "out", UpcycleConfig(**settings), sources=two_sources(base, tmp_path))
    lines = [line for line in made.receipt.comparisons if "alone" in line.text]
    assert len(lines) == made.plan.settings.num_router_rows
    assert all(line.limit is not None and line.rel <= line.limit for line in lines)
    outside = [line for line in made.receipt.comparisons if line.router == "no"]
    assert bool(outside) == (settings.get("receipt") == "layers")
    assert all(line.bitwise == line.bitwise_due == ("merging" in settings) for line in outside)
    assert not made.plan.keeps_function
    assert any("by design" in note for note in made.receipt.notes)


def test_a_wrong_expert_breaks_the_receipt(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path)

    def write_swapped(*arguments: Any) -> int:
        path = arguments[1] / "model.safetensors"
        state = load_file(path)
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in (0, 1)]
        state[names[0]], state[names[1]] = state[names[1]].clone(), state[names[0]].clone()
        save_file(state, path, metadata={"format": "pt"})
        return 0

    monkeypatch.setattr("dense2moe.upcycle.building.making.check_written", write_swapped)
    with pytest.raises(UpcycleError, match=r"each layer, expert 0 \(code\) alone: differs from the dense model"):
        upcycle(base, tmp_path / "out", UpcycleConfig(), sources=sources)
    assert not (tmp_path / "out").exists()


def test_sources_equal_to_the_base_are_proved_as_copies_are(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    made = upcycle(base, tmp_path / "out", UpcycleConfig(), sources={"a": base, "b": base})
    assert made.plan.keeps_function
    assert all(distance.equal for distance in made.distances)
    zero = [line for line in made.receipt.comparisons if line.router == "zero"]
    assert zero
    assert all(line.bitwise_due and (line.bitwise or line.halves_bitwise) for line in zero)


# Distances


def test_distances_are_frobenius_norms_by_class(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(attention_bias=True, architecture="LlamaForCausalLM", tie_word_embeddings=False)
    sources = two_sources(base, tmp_path)
    checkpoint = open_checkpoint(base)
    found = measure_distances(checkpoint, open_sources(checkpoint, sources), (), lambda *_: None)
    own, other = (
        {name: tensor.double().numpy() for name, tensor in load_file(each / "model.safetensors").items()}
        for each in (base, sources["maths"])
    )
    classes = {
        "ffn": [name for name in own if ".mlp." in name],
        "attention": [name for name in own if "self_attn" in name and name.endswith("weight")],
        "biases": [name for name in own if name.endswith("bias")],
        "norms": [name for name in own if "norm" in name],
        "embedding": ["model.embed_tokens.weight"],
        "head": ["lm_head.weight"],
    }
    assert [distance.name for distance in found] == ["code", "maths"]
    assert found[1].by_class.keys() == classes.keys()
    for kind, names in classes.items():
        change = np.sqrt(sum(np.square(other[name] - own[name]).sum() for name in names))
        norm = np.sqrt(sum(np.square(own[name]).sum() for name in names))
        assert found[1].by_class[kind] == pytest.approx(change / norm, rel=1e-6)  # type: ignore[index]
    assert not found[1].equal


# Tokenizers, templates, settings of generation


def told(base: Path, source: Path) -> list[str]:
    first, second = open_checkpoint(base), open_checkpoint(source)
    return list(compare_companions(first, "sources.code", second))


def test_equal_companions_are_not_told(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense()
    assert told(base, fine_tune(base, tmp_path / "code", 0)) == []


def test_an_added_token_is_refused_with_its_id(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense()
    source = fine_tune(base, tmp_path / "code", 0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken("<tool>")])
    tokenizer.save_pretrained(source)
    with pytest.raises(UpcycleError) as excinfo:
        told(base, source)
    assert str(excinfo.value).startswith(
        f"sources.code ({source}): token '<tool>' has the id 300; in the base it is not there"
    )


def test_the_first_token_under_another_id_is_named(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense()
    source = fine_tune(base, tmp_path / "code", 0)
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (7, 9))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    with pytest.raises(UpcycleError, match=r"has the id [79]; in the base it has the id [79]"):
        told(base, source)


def test_another_cut_of_the_same_text_is_refused(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense()
    source = fine_tune(base, tmp_path / "code", 0)
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(values))
    with pytest.raises(UpcycleError, match="cuts one text otherwise than the base's, from token 0 on"):
        told(base, source)


def test_templates_and_settings_that_differ_are_told(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense()
    source = fine_tune(base, tmp_path / "code", 0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(source)
    for name, fields in (
        ("generation_config.json", {"temperature": 0.5, "do_sample": True}),
        ("config.json", {"eos_token_id": 3, "max_position_embeddings": 512}),
    ):
        path = source / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    lines = told(base, source)
    assert "sources.code: eos_token_id is 3; the mixture has the base's, 1" in lines
    assert "sources.code: max_position_embeddings is 512; the mixture has the base's, 256" in lines
    assert "sources.code: its chat template is another one; the base has none" in lines
    assert any("generation_config.json says temperature 0.5" in line for line in lines)
