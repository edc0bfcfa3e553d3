"""Calibration sees what transformers' own matrices see, and what is quantized by it is nearer to the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dense2moe.export.coverage import classify_tensor, find_decoder_family
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.blockwise import dequantize, quantize
from dense2moe.export.quantization.calibration import CalibrationWalk, Group
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.twin import SCHEME_NAME
from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.parts import ATTENTION

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0

MakeDense = Callable[..., Path]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("MistralForCausalLM", {"sliding_window": 12, "head_dim": 16}, {}),
    "qwen2_moe, shared": ("LlamaForCausalLM", {}, {"shared_expert": "half"}),
    "qwen3_moe, some layers": ("Qwen3ForCausalLM", {"head_dim": 16}, {"layers": [1]}),
    "granitemoe, stacked": ("GraniteForCausalLM", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}, {}),
    "granitemoeshared": ("GraniteForCausalLM", {"residual_multiplier": 0.5}, {"shared_expert": "half"}),
    "glm4_moe, shared": ("LlamaForCausalLM", {}, {"target": "glm4_moe", "shared_expert": "half"}),
    "flex_olmo": ("Olmo2ForCausalLM", {}, {}),
}


def make_mixture(dense: Path, directory: Path, settings: dict[str, Any]) -> Path:
    directory.mkdir()
    upcycle(
        dense, directory, UpcycleConfig(num_experts=4, experts=ExpertsConfig(noise=0.5), **settings), 0, lambda *_: None
    )
    return directory


def draw_blocks(num_blocks: int, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (num_blocks, length), generator=torch.Generator().manual_seed(seed))


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Every matrix that torch multiplies with in between, and its inputs."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((weight.detach().clone(), x.detach().flatten(0, -2).clone()))
        return plain(x, weight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        yield calls


def moments_of(calls: list[tuple[torch.Tensor, torch.Tensor]], weights: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """X'X of the inputs of a matrix, which may have been multiplied together with others below each other.

    And the tokens.
    """
    for candidate in (torch.cat(weights), weights[0]):
        found = [x for weight, x in calls if weight.shape == candidate.shape and torch.equal(weight, candidate)]
        if found:
            inputs = torch.cat(found).double()
            return inputs.T @ inputs, len(inputs)
    inputs = torch.zeros(0, weights[0].shape[1], dtype=torch.float64)
    return inputs.T @ inputs, 0


@pytest.mark.parametrize("name", CASES)
def test_every_group_reads_what_transformers_matrices_read(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second layer behind the first one as it is quantized."""
    architecture, overrides, settings = CASES[name]
    mixture = make_mixture(make_dense(architecture=architecture, **overrides), tmp_path / "mixture", settings)
    (tmp_path / "twin").mkdir()
    quantize_checkpoint(
        mixture, tmp_path / "twin", "int4", QuantizeConfig(method="search", attention_bits="variant"), lambda *_: None
    )
    model, twin, blocks = load(mixture), load(tmp_path / "twin"), draw_blocks(6)
    model.model.layers[0].load_state_dict(twin.model.layers[0].state_dict())
    checkpoint, twin_checkpoint = open_checkpoint(mixture), open_checkpoint(tmp_path / "twin")
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), blocks, all_experts=False)
    list(walk.read_layer(0))
    walk.advance(0, {key: twin_checkpoint.read(key) for key in checkpoint.entries if key.startswith("model.layers.0.")})
    with recorded(monkeypatch) as calls, torch.no_grad():
        model(input_ids=blocks, use_cache=False)
    groups = list(walk.read_layer(1))
    names = {key for group in groups for key, _ in group.matrices}
    assert names == {
        key for key in checkpoint.entries if key.startswith("model.layers.1.") and is_quantized(checkpoint, key)
    }
    experts = [group for group in groups if group.expert is not None]
    assert len(experts) == 8
    num_seen = 0
    for group in groups:
        expected, count = moments_of(calls, [walk.read_matrix(*matrix) for matrix in group.matrices])
        inputs = group.read().actual.double()
        assert len(inputs) == count, group.matrices
        torch.testing.assert_close(
            inputs.T @ inputs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1e-9)
        )
        num_seen += count if group.expert is not None else 0
    assert num_seen == 2 * 2 * blocks.numel(), "two matrices' groups of two experts a token"


def is_quantized(checkpoint: Any, key: str) -> bool:
    kind = classify_tensor(find_decoder_family(checkpoint.config), key)
    return kind in ("experts", "attention") and checkpoint.entries[key].num_elements > 0


def test_all_experts_see_all_tokens_where_that_is_asked_for(mixture_checkpoint: Path) -> None:
    checkpoint, blocks = open_checkpoint(mixture_checkpoint), draw_blocks(3)
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), blocks, all_experts=True)
    assert {len(group.read().actual) for group in walk.read_layer(0)} == {blocks.numel()}


@pytest.mark.parametrize("name", ["qwen2_moe, shared", "granitemoe, stacked"])
def test_gptq_is_nearer_to_the_model_than_search_and_search_than_rounding(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    architecture, overrides, settings = CASES[name]
    mixture = make_mixture(make_dense(architecture=architecture, **overrides), tmp_path / "mixture", settings)
    blocks, held_out = draw_blocks(128), draw_blocks(32, seed=1)
    with torch.no_grad():
        expected = load(mixture)(input_ids=held_out).logits
    errors = {}
    for method in ("round", "search", "gptq"):
        twin = tmp_path / method
        twin.mkdir()
        config = QuantizeConfig(method=method, block_size=16, attention_bits="variant")
        facts = quantize_checkpoint(mixture, twin, "int4", config, lambda *_: None, QuantizeInputs(blocks=blocks))
        assert (facts.method, facts.quantized_expert_share) == (method, 1.0)
        with torch.no_grad():
            errors[method] = float((load(twin)(input_ids=held_out).logits - expected).square().mean())
    assert errors["gptq"] < 0.9 * errors["search"]
    assert errors["search"] < errors["round"]


@pytest.mark.parametrize("zero_points", [False, True])
def test_an_expert_without_enough_tokens_is_searched_and_counted(
    mixture_checkpoint: Path, tmp_path: Path, zero_points: bool
) -> None:
    """An expert that no token visits, among them: its weights are rounded as without calibration."""
    few, none = tmp_path / "few", tmp_path / "search"
    for path in (few, none):
        path.mkdir()
    blocks = draw_blocks(1, length=2)
    config = QuantizeConfig(block_size=16, zero_points=zero_points)
    facts = quantize_checkpoint(mixture_checkpoint, few, "int4", config, lambda *_: None, QuantizeInputs(blocks=blocks))
    scheme = json.loads((few / SCHEME_NAME).read_text())
    counts = [count for layer in scheme["expert_tokens"].values() for count in layer]
    assert len(counts) == 2 * 4
    assert sum(counts) == 2 * 2 * blocks.numel()
    assert facts.fewest_expert_tokens == min(counts) == 0
    assert facts.num_matrices_with_few_tokens == sum(
        bits < 8 for name, bits in scheme["tensors"].items() if ".layers." in name
    )
    (warning,) = facts.warnings
    # the FFN's width is 48, and an expert with the fewest tokens counts as if it had one
    enough = 2 * 48 * blocks.numel()
    assert (
        f"calibration read 2 tokens, about {enough:,} are enough; set quantize.calibration_tokens to that, and "
        "data.max_train_tokens" in warning
    )
    searched = QuantizeConfig(method="search", block_size=16, zero_points=zero_points)
    quantize_checkpoint(mixture_checkpoint, none, "int4", searched, lambda *_: None)
    layer, expert = next(
        (layer, n) for layer, found in scheme["expert_tokens"].items() for n, count in enumerate(found) if count == 0
    )
    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
    assert torch.equal(open_checkpoint(few).read(name), open_checkpoint(none).read(name))


def test_calibration_reads_no_more_tokens_than_it_may(mixture_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    config = QuantizeConfig(block_size=16, calibration_tokens=100)
    quantize_checkpoint(
        mixture_checkpoint,
        tmp_path / "twin",
        "int4",
        config,
        lambda *_: None,
        QuantizeInputs(blocks=draw_blocks(16, length=20)),
    )
    scheme = json.loads((tmp_path / "twin" / SCHEME_NAME).read_text())
    assert {sum(layer) for layer in scheme["expert_tokens"].values()} == {2 * 100}


def test_quantizing_twice_gives_the_same_integers(mixture_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        quantize_checkpoint(
            mixture_checkpoint,
            tmp_path / name,
            "int4",
            QuantizeConfig(block_size=16),
            lambda *_: None,
            QuantizeInputs(blocks=draw_blocks(16)),
        )
    for file in ("model.safetensors", "scales.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_groups_name_their_experts_in_order(mixture_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(mixture_checkpoint)
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), draw_blocks(1), all_experts=False)
    groups: list[Group] = list(walk.read_layer(0))
    assert [group.expert for group in groups] == [None, None, 0, 0, 1, 1, 2, 2, 3, 3]


def test_gptq_without_text_is_refused_in_one_line(mixture_checkpoint: Path, tmp_path: Path) -> None:
    message = (
        r"^quantize\.method is 'gptq', which learns from text, and there is none; give blocks of it, or set "
        r"method to 'search'$"
    )
    with pytest.raises(ExportError, match=message):
        quantize_checkpoint(mixture_checkpoint, tmp_path, "int4", QuantizeConfig(method="gptq"), lambda *_: None)


def test_by_default_4_bits_are_learned_and_8_bits_searched(mixture_checkpoint: Path, tmp_path: Path) -> None:
    found, methods = {}, {}
    for method in ("auto", "search"):
        (tmp_path / method).mkdir()
        config = QuantizeConfig(method=method, block_size=16, input_scaling="awq")
        facts = quantize_checkpoint(
            mixture_checkpoint,
            tmp_path / method,
            "int4",
            config,
            lambda *_: None,
            QuantizeInputs(blocks=draw_blocks(16)),
        )
        checkpoint = open_checkpoint(tmp_path / method)
        found[method], methods[method] = {name: checkpoint.read(name) for name in checkpoint.entries}, facts.method
    assert methods == {"auto": "gptq for 4 bits, search for 8 bits", "search": "search"}
    same = {name for name, tensor in found["auto"].items() if torch.equal(tensor, found["search"][name])}
    first = {name for name in found["auto"] if ".layers.0." in name}
    assert {name for name in first if "self_attn" in name} <= same
    assert not {name for name in first if "experts" in name} & same


def test_8_bits_are_searched_on_the_float_model_or_without_text(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing of int8 is behind what is quantized")

    monkeypatch.setattr(CalibrationWalk, "read_layer", fail)
    monkeypatch.setattr(CalibrationWalk, "advance", fail)
    for name, blocks in (("text", draw_blocks(16)), ("none", None)):
        (tmp_path / name).mkdir()
        facts = quantize_checkpoint(
            mixture_checkpoint,
            tmp_path / name,
            "int8",
            QuantizeConfig(block_size=16),
            lambda *_: None,
            QuantizeInputs(blocks=blocks),
        )
        assert (facts.method, facts.num_scaled_groups > 0, facts.warnings) == ("search", blocks is not None, ())


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared", "flex_olmo"])
def test_a_matrix_is_behind_those_before_it_as_they_are_by_now(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer of one stream is disturbed, and so is the second one's attention.

    Each stream is what transformers computes.
    """
    architecture, overrides, settings = CASES[name]
    mixture = make_mixture(make_dense(architecture=architecture, **overrides), tmp_path / "mixture", settings)
    checkpoint, blocks = open_checkpoint(mixture), draw_blocks(3)
    family, generator = find_decoder_family(checkpoint.config), torch.Generator().manual_seed(0)
    model, moved = load(mixture), load(mixture)
    walk = CalibrationWalk(checkpoint, family, blocks, all_experts=False)
    list(walk.read_layer(0))
    output = family.name("attention_output", 0)
    changed = {
        output: checkpoint.read(output) + 0.1 * torch.randn(checkpoint.entries[output].shape, generator=generator)
    }
    moved.get_parameter(output).data.copy_(changed[output])
    walk.advance(0, changed)
    groups = walk.read_layer(1)
    first = next(groups)
    for key in (family.name(part, 1) for part in ATTENTION):
        weight = checkpoint.read(key) + 0.1 * torch.randn(checkpoint.entries[key].shape, generator=generator)
        moved.get_parameter(key).data.copy_(weight)
        walk.replace(key, None, weight)
    second = next(groups)
    experts = [group for group in groups if group.expert is not None][::2]
    with torch.no_grad():
        seen = {}
        for kind, which in (("reference", model), ("actual", moved)):
            with recorded(monkeypatch) as calls:
                seen[kind] = (
                    calls,
                    which(input_ids=blocks, use_cache=False, output_hidden_states=True).hidden_states[1].flatten(0, 1),
                )
    for kind, which in (("reference", model), ("actual", moved)):
        for group in (first, second):
            weight = which.get_parameter(group.matrices[0][0])
            expected = next(
                x
                for candidate, x in seen[kind][0]
                if candidate.shape == weight.shape and torch.equal(candidate, weight)
            )
            torch.testing.assert_close(getattr(group.read(), kind), expected, rtol=1e-4, atol=1e-5)
    drifts = [group.read().drift for group in (second, *experts)]
    if name == "flex_olmo":
        assert drifts == [None] * 5, "a norm stands between"
        return
    difference = (seen["reference"][1] - seen["actual"][1]) / family.multipliers(checkpoint.config).residual
    torch.testing.assert_close(drifts[0], difference, rtol=1e-4, atol=1e-5)
    assert first.read().drift is None
    assert all(group.read().drift is None for group in experts), "the first matrices of an expert"


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_was_read_is_passed_as_one_that_was_not_and_less_is_computed(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, so that a killed quantization goes on as if it had not been; and as transformers computes it."""
    architecture, overrides, settings = CASES[name]
    mixture = make_mixture(make_dense(architecture=architecture, **overrides), tmp_path / "mixture", settings)
    checkpoint, blocks = open_checkpoint(mixture), draw_blocks(9)  # more than one batch
    family, generator = find_decoder_family(checkpoint.config), torch.Generator().manual_seed(0)

    def start() -> CalibrationWalk:
        walk = CalibrationWalk(checkpoint, family, blocks, all_experts=False)
        walk.advance(0, {})
        return walk

    read, unread, as_it_was = start(), start(), load(mixture)
    replaced = {key: checkpoint.read(key).clone() for key in checkpoint.entries if is_quantized(checkpoint, key)}
    replaced = {key: tensor for key, tensor in replaced.items() if key.startswith("model.layers.1.")}
    for group in read.read_layer(1):
        group.read()
        for key, rows in group.matrices:
            flat = replaced[key].flatten(0, -2)
            own = flat[slice(*rows)] if rows else flat
            own += 0.1 * torch.randn(own.shape, generator=generator)
            read.replace(key, rows, own.clone())
    computed: list[str] = []
    attend, inner = torch.nn.functional.scaled_dot_product_attention, CalibrationWalk._compute_inner

    def counted(what: str, function: Any) -> Any:
        return lambda *given, **named: (computed.append(what), function(*given, **named))[1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted("attention", attend))
        patch.setattr(CalibrationWalk, "_compute_inner", counted("experts", inner))
        read.advance(1, replaced)
        assert not computed
        unread.advance(1, replaced)
        assert set(computed) == {"attention", "experts"}
    assert torch.equal(read.states, unread.states)
    assert torch.equal(read.reference_states, unread.reference_states)
    state = {key: checkpoint.read(key) for key in checkpoint.entries} | replaced
    save_file(state, tmp_path / "mixture" / "model.safetensors", metadata={"format": "pt"})
    seen: list[torch.Tensor] = []
    for model in (load(mixture), as_it_was):
        model.model.layers[1].register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model(input_ids=blocks, use_cache=False)
    torch.testing.assert_close(read.states, seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.reference_states, seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["attention_output", "expert_down", "router"])
def test_what_was_read_behind_other_tensors_is_computed_again(mixture_checkpoint: Path, part: Any) -> None:
    checkpoint, blocks = open_checkpoint(mixture_checkpoint), draw_blocks(3)
    family = find_decoder_family(checkpoint.config)
    read, unread = (CalibrationWalk(checkpoint, family, blocks, all_experts=False) for _ in range(2))
    told = {}
    for group in read.read_layer(0):
        group.read()
        for key, rows in group.matrices:
            told[key] = 1.1 * checkpoint.read(key)
            read.replace(key, rows, told[key])
    name = str(family.find(part)).format(layer=0, expert=1)
    other = told | {name: -checkpoint.read(name)}
    read.advance(0, other)
    unread.advance(0, other)
    assert torch.equal(read.states, unread.states)


@pytest.mark.parametrize(("name", "tied"), [("mixtral", False), ("granitemoe, stacked", True)])
def test_the_head_is_nearer_to_the_model_than_with_searched_scales(
    tied: bool, name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    architecture, overrides, settings = CASES[name]
    dense = make_dense(architecture=architecture, tie_word_embeddings=tied, **overrides)
    mixture = make_mixture(dense, tmp_path / "mixture", settings)
    checkpoint, model, blocks, held_out = (
        open_checkpoint(mixture),
        load(mixture),
        draw_blocks(64),
        draw_blocks(16, seed=1),
    )
    (tmp_path / "twin").mkdir()
    # the head alone is compared, with the norm as it was
    config = QuantizeConfig(block_size=16, embedding_bits="variant", input_scaling="none")
    quantize_checkpoint(mixture, tmp_path / "twin", "int4", config, lambda *_: None, QuantizeInputs(blocks=blocks))
    head = model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        hidden = model.model(input_ids=held_out).last_hidden_state
        expected = hidden @ head.T
        errors = [
            float((hidden @ found.T - expected).square().mean())
            for found in (
                load(tmp_path / "twin").get_output_embeddings().weight,
                dequantize(quantize(head, 4, 16), 32, 4),
            )
        ]
    assert errors[0] < (0.95 if tied else 0.8) * errors[1]
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), blocks, all_experts=False)
    for layer in range(2):
        list(walk.read_layer(layer))
        walk.advance(layer, {})
    with torch.no_grad():
        seen = model.model(input_ids=blocks).last_hidden_state.flatten(0, 1)
    inputs = walk.read_head("model.embed_tokens.weight" if tied else "lm_head.weight").read()
    for found in (inputs.actual, inputs.reference):
        torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-4)
