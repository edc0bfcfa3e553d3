"""A model run layer by layer, one layer in memory, gives the hidden states of transformers' own model of all layers."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.layerwise import apply_head, embed, load_layer, pad_left, real_tokens, run_layers
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

MakeDense = Callable[..., Path]
FFN = "layers.{layer}.mlp"
WINDOW, NUM_LAYERS = 12, 4
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
SOURCES: dict[str, dict[str, Any]] = {
    "llama, llama3 rope": {"architecture": "LlamaForCausalLM", "rope_parameters": ROPE, "head_dim": 16},
    "llama, attention biases": {
        "architecture": "LlamaForCausalLM",
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral, window": {"architecture": "MistralForCausalLM", "sliding_window": WINDOW},
    "phi3, window": {"architecture": "Phi3ForCausalLM", "sliding_window": WINDOW},
    "phi3, longrope": {
        "architecture": "Phi3ForCausalLM",
        "original_max_position_embeddings": 32,
        "rope_parameters": LONG_ROPE,
        "sliding_window": None,
    },
    "gemma": {"architecture": "GemmaForCausalLM", "head_dim": 16},
    "qwen2, windows in half of the layers": {
        "architecture": "Qwen2ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 16},
    "qwen3, windows in half of the layers": {
        "architecture": "Qwen3ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "olmo2": {"architecture": "Olmo2ForCausalLM"},
    "granite": {
        "architecture": "GraniteForCausalLM",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "granite swa, windows and rotary bases by layer": {
        "architecture": "GraniteSWAForCausalLM",
        "embedding_multiplier": 3.0,
        "sliding_window": WINDOW,
        "layer_rope_theta": [0, 1e4, 100.0, 1e4],
    },
    "cohere2": {"architecture": "Cohere2ForCausalLM", "sliding_window": WINDOW},
    "ernie4.5": {"architecture": "Ernie4_5ForCausalLM", "head_dim": 16},
    "lfm2": {"architecture": "Lfm2ForCausalLM", "layer_types": ["conv", "full_attention"] * 2},
    "llama, both ways": {"architecture": "LlamaForCausalLM", "is_causal": False},
    "a base model": {"architecture": "MistralModel", "sliding_window": WINDOW},
}
Dense = Callable[[str], Path]


def ffn_of(name: str) -> str:
    """The module of the FFN of one of `SOURCES`."""
    return "layers.{layer}.feed_forward" if name == "lfm2" else FFN


def quiet(what: str, done: int, total: int) -> None:
    pass


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows of random ids past the window, of four lengths, and their mask."""
    generator = torch.Generator().manual_seed(1)
    return pad_left([torch.randint(2, 300, (length,), generator=generator).tolist() for length in (40, 25, 40, 13, 1)])


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Dense:
    """A tiny checkpoint of one of `SOURCES`, made once."""

    @cache
    def make(name: str) -> Path:
        return make_dense(intermediate_size=64, num_hidden_layers=NUM_LAYERS, **SOURCES[name])

    return make


@torch.no_grad()
def whole(directory: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """What transformers' model of all layers computes at each.

    What the layer reads, what its FFN reads, and what it gives, by hooks.
    """
    # of the shared expert of width 0 that Qwen2-MoE must have; `load_layer` has to be quiet of it by itself
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element", category=UserWarning)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")
    found: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    for place, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, given, into=found[place]: into.update(before=given[0]))
        ffn = next(getattr(layer, name) for name in ("mlp", "block_sparse_moe", "feed_forward") if hasattr(layer, name))
        ffn.register_forward_pre_hook(lambda _, given, into=found[place]: into.update(read=given[0]))
        layer.register_forward_hook(lambda _, __, output, into=found[place]: into.update(after=output))
    ids, mask = text()
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


# The dense model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOURCES)
def test_layers_run_one_by_one_are_the_layers_of_the_whole_model(name: str, dtype: torch.dtype, dense: Dense) -> None:
    ids, mask = text()
    expected = whole(dense(name), dtype)
    count = 0
    for layer, before, read, after in run_layers(
        open_checkpoint(dense(name)), ids, mask, dtype, ffn_of(name), batch_rows=len(ids)
    ):
        assert layer == count
        count += 1
        for kind, found in (("before", before), ("read", read), ("after", after)):
            assert found.dtype == dtype
            # The very bits, where the batch is the same: the same operators in the same order. Padded places as well.
            assert torch.equal(found, expected[layer][kind]), (layer, kind)
    assert count == NUM_LAYERS


@pytest.mark.parametrize("name", SOURCES)
def test_matrices_that_stay_as_they_are_stored_give_the_states_of_float32(name: str, make_dense: MakeDense) -> None:
    ids, mask = text()
    stored = make_dense(torch.bfloat16, intermediate_size=64, num_hidden_layers=NUM_LAYERS, **SOURCES[name])
    expected = whole(stored)
    for layer, _, read, after in run_layers(
        open_checkpoint(stored), ids, mask, torch.float32, ffn_of(name), batch_rows=len(ids), narrow=True
    ):
        for kind, found in (("read", read), ("after", after)):
            assert found.dtype == torch.float32
            # biases are added to sums that are rounded
            assert largest_difference(found, expected[layer][kind]) <= 2e-6, (layer, kind)


@pytest.mark.parametrize("name", SOURCES)
def test_the_norm_of_the_last_layers_states_is_what_transformers_returns(name: str, dense: Dense) -> None:
    """By another road than hooks: `output_hidden_states`, whose last are normed."""
    ids, mask = text()
    model = AutoModelForCausalLM.from_pretrained(dense(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        runs = list(run_layers(open_checkpoint(dense(name)), ids, mask, torch.float32, ffn_of(name)))
        norm = getattr(model.model, "norm", None) or model.model.embedding_norm
        found = [before for _, before, _, _ in runs] + [norm(runs[-1][3])]
    assert len(found) == len(expected) == NUM_LAYERS + 1
    real = mask.bool()
    assert all(torch.equal(one[real], other[real]) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["mistral, window", "phi3, longrope", "gemma", "olmo2"])
@pytest.mark.parametrize("batch_rows", [1, 2])
def test_fewer_rows_at_once_give_the_same_states(batch_rows: int, name: str, dense: Dense) -> None:
    ids, mask = text()
    expected = whole(dense(name))
    for layer, _, read, after in run_layers(open_checkpoint(dense(name)), ids, mask, torch.float32, FFN, batch_rows):
        for kind, found in (("read", read), ("after", after)):
            # matrix products of another height sum in another order
            assert largest_difference(found[mask.bool()], expected[layer][kind][mask.bool()]) <= 2e-6


def test_padding_changes_no_real_token(dense: Dense) -> None:
    """Each row alone, without padding, by the whole model."""
    directory = dense("mistral, window")
    ids, mask = text()
    runs = [after for _, _, _, after in run_layers(open_checkpoint(directory), ids, mask, torch.float32, FFN)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for row in range(len(ids)):
        with torch.no_grad():
            expected = model.model(
                input_ids=ids[row : row + 1, mask[row].bool()], use_cache=False, output_hidden_states=True
            ).hidden_states
        for layer in range(NUM_LAYERS - 1):
            found = runs[layer][row, mask[row].bool()]
            # Rotary positions are counted from the padding, so angles differ by a constant that cancels up to rounding:
            # measured 1e-6.
            assert float((found - expected[layer + 1][0]).abs().max() / expected[layer + 1].abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["llama, llama3 rope", "gemma", "granite"])
def test_an_embedding_of_the_texts_own_tokens_is_that_of_all(name: str, dense: Dense) -> None:
    ids = torch.tensor([[7, 7, 299, 0], [3, 299, 7, 250]])
    model = AutoModelForCausalLM.from_pretrained(dense(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[0]
        assert torch.equal(embed(open_checkpoint(dense(name)), ids, torch.float32), expected)


@pytest.mark.parametrize(("name", "dropped"), [("gemma", "embedding scale"), ("granite", "embedding_multiplier")])
def test_the_scale_of_an_embedding_shows(name: str, dropped: str, dense: Dense) -> None:
    """Otherwise the tests above would prove nothing of it."""
    ids = torch.tensor([[7, 8]])
    table = load_file(dense(name) / "model.safetensors")["model.embed_tokens.weight"]
    with torch.no_grad():
        found = embed(open_checkpoint(dense(name)), ids, torch.float32)
    assert float((found - table[ids]).abs().max()) > float(table[ids].abs().max())


# of the whole Qwen2-MoE; `apply_head` builds no shared expert
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "name", ["llama, llama3 rope", "qwen2, windows in half of the layers", "gemma", "olmo2", "granite"]
)
def test_the_head_alone_gives_the_logits_of_the_whole_model(
    name: str, tied: bool, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Of the dense model and of its mixture, whose head is stored even where Gemma's is not."""
    dense = make_dense(intermediate_size=64, **SOURCES[name] | {"tie_word_embeddings": tied or name == "gemma"})
    upcycle(dense, tmp_path, UpcycleConfig(num_experts=4), 0, quiet)
    ids = torch.tensor([[7, 7, 299, 0, 3, 250]])
    for directory in (dense, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        states: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, given, into=states: into.append(given[0][0]))
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[0]
        assert torch.equal(apply_head(open_checkpoint(directory), states[0], dtype), expected)


@pytest.mark.parametrize(
    ("tied", "name"), [(True, "model.norm.weight"), (False, "lm_head.weight"), (True, "model.embed_tokens.weight")]
)
def test_a_head_that_lacks_a_tensor_is_refused(tied: bool, name: str, make_dense: MakeDense) -> None:
    directory = make_dense(tie_word_embeddings=tied)
    state = load_file(directory / "model.safetensors")
    del state[name]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    where = re.escape(f"{directory}: head: tensor '{name}' missing, which transformers would initialize at random")
    with pytest.raises(UpcycleError, match=f"^{where}"):
        apply_head(open_checkpoint(directory), torch.zeros(3, 32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["equal", "different", "alone"])
def test_a_head_stored_beside_a_tied_embedding_is_tied_where_transformers_ties_it(
    kind: str, dtype: torch.dtype, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever our own rule says of it."""
    directory = make_dense()
    state = load_file(directory / "model.safetensors")
    table = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = table.flip(0).contiguous() if kind == "different" else table.clone()
    if kind == "alone":
        del state["model.embed_tokens.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, given, into=states: into.append(given[0][0]))
    with torch.no_grad():
        expected = model(torch.tensor([[7, 7, 299, 0, 3, 250]]), use_cache=False).logits[0]
    for blind in (False, True):
        if blind:
            monkeypatch.setattr("dense2moe.upcycle.checkpoints.reader._are_equal", lambda *_: True)
        assert torch.equal(apply_head(open_checkpoint(directory), states[0], dtype), expected)


def test_sharded_checkpoints_run_too(make_dense: MakeDense, dense: Dense) -> None:
    sharded = make_dense(
        max_shard_size="30KB", intermediate_size=64, num_hidden_layers=NUM_LAYERS, **SOURCES["phi3, window"]
    )
    assert len(list(sharded.glob("*.safetensors"))) > 4
    runs = [
        list(run_layers(open_checkpoint(path), *text(), torch.float32, FFN))
        for path in (sharded, dense("phi3, window"))
    ]
    assert all(torch.equal(one[3], other[3]) for one, other in zip(*runs, strict=True))


# Layers of a mixture


MIXTURES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mistral, window", {}),
    "granitemoe": ("llama, attention biases", {}),
    "granitemoeshared": ("granite", {"shared_expert": "half"}),
    "qwen2_moe": ("qwen2, windows in half of the layers", {"layers": "every-2", "shared_expert": "half"}),
    "qwen2_moe without a shared expert": ("llama, llama3 rope", {"layers": [0, 3]}),
    "qwen3_moe": ("qwen3", {"layers": [0, 1, 3]}),
    "glm4_moe": ("llama, llama3 rope", {"target": "glm4_moe", "layers": [2, 3], "shared_expert": "half"}),
    "flex_olmo": ("olmo2", {}),
    "granitemoe_swa": ("granite swa, windows and rotary bases by layer", {}),
    "cohere2_moe": ("cohere2", {"layers": [1, 3]}),
    "ernie4_5_moe": ("ernie4.5", {"layers": "every-2"}),
    "lfm2_moe": ("lfm2", {"layers": [2, 3]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_layer_of_a_mixture_is_that_of_the_whole_mixture(
    name: str, dtype: torch.dtype, dense: Dense, tmp_path: Path
) -> None:
    source, settings = MIXTURES[name]
    plan = upcycle(
        dense(source), tmp_path, UpcycleConfig(num_experts=4, router=RouterConfig(logit_std=1.0), **settings), 0, quiet
    )
    assert plan.conversion.target.model_type == name.split()[0]
    mixture, mask = open_checkpoint(tmp_path), text()[1]
    for layer, expected in enumerate(whole(tmp_path, dtype)):
        model = load_layer(mixture, layer, dtype)
        assert any(hasattr(module, "experts") for module in model.modules()) == (
            layer in {site.layer for site in plan.sites}
        )
        with torch.no_grad():
            found = model(inputs_embeds=expected["before"], attention_mask=mask, use_cache=False).last_hidden_state
        assert torch.equal(found, expected["after"])


# Refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            "tensor 'model.layers.1.mlp.up_proj.weight' missing, which transformers would initialize at random; "
            "restore the file that held it",
        ),
        (
            lambda state: state.update({"model.layers.1.extra.weight": torch.ones(1)}),
            "tensor 'model.layers.1.extra.weight' unused, which transformers would ignore; remove it, or "
            "correct config.json",
        ),
    ],
)
def test_a_layer_with_tensors_missing_or_left_over_is_refused_by_its_number(
    change: Callable[[dict[str, torch.Tensor]], Any], reason: str, dense: Dense, tmp_path: Path
) -> None:
    shutil.copytree(dense("llama, llama3 rope"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    load_layer(checkpoint, 0, torch.float32)
    with pytest.raises(UpcycleError) as excinfo:
        load_layer(checkpoint, 1, torch.float32)
    assert str(excinfo.value) == f"{tmp_path}: layer 1: {reason}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_rotary_tensors_of_an_old_checkpoint_are_passed_over(dtype: torch.dtype, dense: Dense, tmp_path: Path) -> None:
    shutil.copytree(dense("llama, attention biases"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=dtype)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    runs = [
        list(run_layers(open_checkpoint(path), *text(), torch.float32, FFN))
        for path in (tmp_path, dense("llama, attention biases"))
    ]
    assert all(torch.equal(one[3], other[3]) for one, other in zip(*runs, strict=True))


def test_the_config_of_the_checkpoint_is_left_as_it_was(dense: Dense) -> None:
    checkpoint = open_checkpoint(dense("qwen2, windows in half of the layers"))
    before = json.dumps(checkpoint.config.to_dict(), default=str, sort_keys=True)
    list(run_layers(checkpoint, *text(), torch.float32, FFN))
    assert json.dumps(checkpoint.config.to_dict(), default=str, sort_keys=True) == before


# Padding


def test_rows_are_padded_on_the_left_with_a_token_of_their_own() -> None:
    ids, mask = pad_left([[5, 6, 7], [8], [9, 10]])
    assert ids.tolist() == [[5, 6, 7], [5, 5, 8], [5, 9, 10]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_real_tokens_are_those_of_the_mask_in_float32() -> None:
    states = torch.arange(12, dtype=torch.bfloat16).reshape(2, 3, 2)
    found = real_tokens(states, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, 3.0], [4.0, 5.0], [10.0, 11.0]]
