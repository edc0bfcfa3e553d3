"""A finished mixture gets one more expert, and keeps every bit that it has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import KEPT, NUM_LAYERS, SPARSE
from fine_tunes import fine_tune
from mixtures import EXACT, STORED, MakeDense, experts, load, logits, quiet, rel, settings
from peft import LoraConfig, get_peft_model
from programs import dense2moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe import api
from dense2moe.upcycle.building.config import MergingConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.growth import GrownMixture, RowSettings, add_expert
from dense2moe.upcycle.building.growth_plan import plan_growth
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

pytestmark = [
    # transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have
    pytest.mark.filterwarnings("ignore:Initializing zero-element"),
    # peft asks transformers for what it has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]

ROUTER = re.compile(r".*\.(gate|router\.layer)\.weight")
BIAS = "e_score_correction_bias"


def grow(mixture: Path, source: Path, output: Path, **given: Any) -> GrownMixture:
    output.mkdir()
    row = {name: given.pop(name) for name in ("kind", "seed", "domain", "others") if name in given}
    return add_expert(mixture, source, output, RowSettings(**row), quiet, **given)


def refusal(mixture: Path, source: Path, output: Path, **given: Any) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        grow(mixture, source, output, **given)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def merge(base: Path, sources: dict[str, Path], output: Path, fields: dict[str, Any]) -> Path:
    """A mixture of the base and its sources, an expert each; all else is the base's."""
    output.mkdir()
    kept = UpcycleConfig(
        merging=MergingConfig(method="base"), router=RouterConfig(logit_std=1.0), base_expert="routed", **fields
    )
    upcycle(base, output, kept, 0, quiet, sources=sources)
    return output


def train(mixture: Path) -> Path:
    """As if routers, biases and norms had been trained: none is what a surgery makes."""
    state, generator = load_file(mixture / "model.safetensors"), torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if ROUTER.fullmatch(name) or name.endswith(BIAS) or "norm" in name:
            tensor += torch.empty(tensor.shape).normal_(generator=generator).to(tensor.dtype)
    save_file(state, mixture / "model.safetensors", metadata={"format": "pt"})
    return mixture


# how experts are stored, and a selection bias that is a matrix of one row
KINDS = STORED | {"ernie4_5_moe": ({"architecture": "Ernie4_5ForCausalLM"}, {})}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in KINDS), ("granitemoe", torch.bfloat16)]
)
def test_growing_is_upcycling_with_one_more_source_and_keeps_every_bit(
    name: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense_fields, fields = KINDS[name]
    base = make_dense(dtype, **EXACT | dense_fields)
    sources = {each: fine_tune(base, tmp_path / each, seed) for seed, each in enumerate(("code", "maths", "law"))}
    two = {each: sources[each] for each in ("code", "maths")}
    small = train(merge(base, two, tmp_path / "small", fields))
    large = merge(base, sources, tmp_path / "large", fields)
    grown = grow(small, sources["law"], tmp_path / "grown")

    assert grown.num_experts == 4
    assert config(tmp_path / "grown") == config(large)
    before, after, expected = (weights(each) for each in (small, tmp_path / "grown", large))
    assert after.keys() == expected.keys()
    routers = [each for each in before if ROUTER.fullmatch(each)]
    assert len(routers) == len(grown.layers) == (1 if "layers" in fields else 2)
    for tensor, found in after.items():
        if tensor in before:
            old = before[tensor]
            assert found.dtype == old.dtype
            assert torch.equal(bits(found.flatten()[: old.numel()]), bits(old.flatten())), tensor
        if tensor in routers:
            assert found.shape == (4, 32)
            mean = before[tensor].double().mean(0).to(dtype).double()
            # the mean of three numbers is rounded once in float32, and once to the dtype
            torch.testing.assert_close(found[3].double(), mean, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        elif tensor.endswith(BIAS):
            assert found.flatten()[3] == 0
            assert before[tensor].abs().min() > 0
        elif "norm" not in tensor:
            assert torch.equal(bits(found), bits(expected[tensor])), tensor
    assert grown.num_new_parameters == sum(
        after[each].numel() - (before[each].numel() if each in before else 0)
        for each in after
        if not each.endswith(BIAS)
    )
    assert grown.num_parameters == sum(tensor.numel() for each, tensor in after.items() if not each.endswith(BIAS))
    names = {path.name for path in small.iterdir()}
    assert {path.name for path in (tmp_path / "grown").iterdir()} == names
    for other in names - {"model.safetensors", "config.json"}:
        assert (tmp_path / "grown" / other).read_bytes() == (small / other).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "qwen2_moe", "glm4_moe"])
def test_forced_to_the_new_expert_a_layer_computes_the_source_s_ffn(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """By plain transformers, in the mixture's own trunk, whose norms and attention are not the source's."""
    dense_fields, fields = STORED[name]
    base = make_dense(**EXACT | dense_fields)
    code, law = (fine_tune(base, tmp_path / each, seed, 0.5) for seed, each in enumerate(("code", "law")))
    small = train(merge(base, {"code": code}, tmp_path / "small", fields))
    new = grow(small, law, tmp_path / "grown").num_experts - 1
    mixture, dense = load(tmp_path / "grown"), load(law)
    heard: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def force(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, chosen, given = arguments
        assert given.shape == chosen.shape
        return hidden, torch.full_like(chosen, new), torch.full_like(given, 1 / given.shape[1])

    for place, module in mixture.named_modules():
        if place.endswith(".experts"):
            module.register_forward_pre_hook(force)
            module.register_forward_hook(
                lambda _, given, output, place=place: heard.append((place, given[0], output)), always_call=True
            )
    mixture(torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1)))
    assert len(heard) == (1 if "layers" in fields else 2)
    for place, hidden, output in heard:
        layer = dense.model.layers[int(place.split(".")[2])]
        assert rel(output, layer.mlp(hidden).reshape(output.shape)) < 1e-6  # float32, summed in another order


@torch.no_grad()
def test_until_a_token_chooses_the_new_expert_the_logits_are_the_same(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    new = grow(mixture_checkpoint, dense_checkpoint, tmp_path / "grown").num_experts - 1
    model, chosen = load(tmp_path / "grown"), []
    for place, module in model.named_modules():
        if place.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, output: chosen.append((output[2] == new).any(-1)))
    ids = torch.randint(300, (32, 8), generator=torch.Generator().manual_seed(1))
    found, expected = model(ids).logits, load(mixture_checkpoint)(ids).logits
    visits = torch.stack(chosen).any(0).view(ids.shape)
    untouched = visits.cumsum(1) == 0
    assert 32 < int(untouched.sum()) < 224
    torch.testing.assert_close(found[untouched], expected[untouched], rtol=0, atol=1e-5)
    assert (found - expected).abs().amax(-1)[visits].min() > 1e-3


def test_an_adapter_gives_the_expert_of_its_merged_checkpoint(
    make_dense: MakeDense, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    base = make_dense()
    settings_of = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings_of)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "adapter")
    cast(Any, model).merge_and_unload().save_pretrained(tmp_path / "whole")
    grow(mixture_checkpoint, tmp_path / "adapter", tmp_path / "of-adapter", base=base)
    grow(mixture_checkpoint, tmp_path / "whole", tmp_path / "of-whole")
    found, expected = weights(tmp_path / "of-adapter"), weights(tmp_path / "of-whole")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # products summed in another order
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6 * float(tensor.abs().max()))
    new = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
    assert (found[new] - weights(base)["model.layers.1.mlp.gate_proj.weight"]).abs().max() > 1e-2


def test_every_family_s_mixture_takes_its_own_base(make_dense: MakeDense, tmp_path: Path) -> None:
    """No config value that a mixture carries or derives is taken for one of another base."""
    grown = set[str]()
    cases = {(case.architecture, case.target): case for case in KEPT.values() if case.target != "switch_transformers"}
    for number, case in enumerate(cases.values()):
        sizes = {**EXACT, "num_hidden_layers": NUM_LAYERS}
        dense = make_dense(architecture=case.architecture, **sizes | dict(case.dense))
        output = tmp_path / str(number)
        output.mkdir()
        plan = upcycle(dense, output, UpcycleConfig(num_experts=4, **case.settings), 0, quiet)
        if plan.settings.experts.kind != "copies":
            continue
        scale = None if plan.settings.shared_expert == "none" else 1.0
        mixture = open_checkpoint(output)
        found = plan_growth(mixture, open_checkpoint(dense), scale)
        assert found.num_experts == 4
        assert found.layers == tuple(site.layer for site in plan.sites)
        grown.add(plan.conversion.target.model_type)
    assert grown == {name for name in SPARSE if name != "switch_transformers"}


def test_the_new_expert_has_the_mixture_s_head(make_dense: MakeDense, tmp_path: Path) -> None:
    labels, states = (make_dense(architecture=f"Llama{head}") for head in ("ForTokenClassification", "Model"))
    small = tmp_path / "small"
    small.mkdir()
    upcycle(labels, small, settings(), 0, quiet)
    assert refusal(small, states, tmp_path / "none") == (
        f"{states}: architectures is LlamaModel, which becomes MixtralModel; the mixture is "
        "MixtralForTokenClassification; give a model with the same head"
    )
    assert grow(small, labels, tmp_path / "grown").num_experts == 5


def test_beside_half_a_shared_expert_the_new_one_gives_half(dense_checkpoint: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    upcycle(dense_checkpoint, small, settings(shared_expert="half", target="qwen2_moe"), 0, quiet)
    where = re.escape(f"{small}/config.json: shared_expert_intermediate_size is 48; beside a shared expert ")
    assert re.match(where + r"the new one needs a scale: 0\.5", refusal(small, dense_checkpoint, tmp_path / "none"))
    grow(small, dense_checkpoint, tmp_path / "grown", scale=0.5)
    first, *_, last = experts(tmp_path / "grown", 1, 5)
    assert torch.equal(first.down, last.down)
    assert torch.equal(cast(torch.Tensor, first.gate), cast(torch.Tensor, last.gate))
    # copies of one FFN: whoever is chosen, the mixture computes the dense model
    assert rel(logits(tmp_path / "grown"), logits(dense_checkpoint)) < 1e-5


def test_a_mixture_in_several_files_grows_twice(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    load(mixture_checkpoint).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    grow(tmp_path / "parts", dense_checkpoint, tmp_path / "once")
    grow(tmp_path / "once", dense_checkpoint, tmp_path / "twice")
    before, after = weights(tmp_path / "parts"), weights(tmp_path / "twice")
    assert all(torch.equal(bits(after[name][: len(old)]), bits(old)) for name, old in before.items())
    assert len(after) == len(before) + 2 * 2 * 3
    assert config(tmp_path / "twice") == config(mixture_checkpoint) | {"num_local_experts": 6}
    assert logits(tmp_path / "twice").isfinite().all()


def test_a_drawn_row_is_as_large_as_the_others_and_of_its_seed(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    name, rows = "model.layers.0.block_sparse_moe.gate.weight", []
    for number, seed in enumerate((0, 0, 1)):
        grow(mixture_checkpoint, dense_checkpoint, tmp_path / str(number), kind="normal", seed=seed)
        rows.append(weights(tmp_path / str(number))[name])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0][:4], rows[2][:4])
    assert not torch.equal(rows[0][4], rows[2][4])
    others = weights(tmp_path / "0")["model.layers.1.block_sparse_moe.gate.weight"]
    assert not torch.allclose(rows[0][4] / rows[0][4].norm(), others[4] / others[4].norm(), atol=0.1)
    for row in (rows[0][4], rows[2][4]):
        assert 0.6 < float(row.norm() / rows[0][:4].norm(dim=1).mean()) < 1.6  # 32 elements


def test_a_source_is_rounded_to_the_dtype_of_the_mixture(
    make_dense: MakeDense, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    dense = make_dense(torch.bfloat16)
    small = tmp_path / "small"
    small.mkdir()
    upcycle(dense, small, settings(), 0, quiet)
    exact = make_dense()
    grow(small, exact, tmp_path / "grown")
    assert torch.equal(
        experts(tmp_path / "grown", 1, 5)[4].up, weights(exact)["model.layers.1.mlp.up_proj.weight"].bfloat16()
    )
    grow(mixture_checkpoint, dense, tmp_path / "wider")
    assert torch.equal(
        experts(tmp_path / "wider", 1, 5)[4].up, weights(dense)["model.layers.1.mlp.up_proj.weight"].float()
    )


# Refusals


def changed(directory: Path, target: Path, name: str, value: float) -> Path:
    """A checkpoint with one value of its last FFN changed."""
    shutil.copytree(directory, target)
    state = load_file(target / "model.safetensors")
    state[name][3, 5] = value
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_no_expert_can_hold_are_one_line_and_leave_nothing(
    make_dense: MakeDense, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    broken = changed(make_dense(), tmp_path / "broken", name, float("nan"))
    with pytest.raises(
        api.MendableError, match=rf"/broken: tensor '{name}' holds NaN or infinite values; give"
    ) as line:
        api.add_expert(mixture_checkpoint, broken, tmp_path / "grown")
    assert "\n" not in str(line.value)
    assert not list(tmp_path.glob("grown*"))
    small, large = tmp_path / "small", changed(make_dense(), tmp_path / "large", name, 1e5)
    small.mkdir()
    upcycle(make_dense(torch.float16), small, settings(), 0, quiet)
    said = refusal(small, large, tmp_path / "none")
    assert f"tensor '{name}' holds values beyond torch.float16, the dtype of the mixture's experts; give" in said


Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"hidden_size": 64}, "hidden_size is 64; the mixture has 32; sources must be fine-tuned from the base"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3; the mixture has 2; sources must"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; the mixture has silu; sources must"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; the mixture has 1e-06; sources must"),
        ({"mlp_bias": True}, "mlp_bias is True; MixtralForCausalLM needs False"),
        ({"architecture": "Qwen3ForCausalLM"}, "model_type is qwen3; for a mixture that is mixtral it must be one of "),
        ({"architecture": "T5ForConditionalGeneration"}, "model_type is t5; for a mixture that is mixtral it must be"),
    ],
)
def test_a_source_of_another_base_is_one_line(
    source: dict[str, Any], line: str, make_dense: Make, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    dense = make_dense(**source)
    said = refusal(mixture_checkpoint, dense, tmp_path / "none")
    assert said.startswith(f"{dense}: {line}"), said


def test_another_width_and_parts_of_an_ffn_are_one_line(
    make_dense: Make, mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    said = refusal(mixture_checkpoint, make_dense(intermediate_size=56), tmp_path / "wide")
    assert said.startswith(f"{mixture_checkpoint}/config.json: intermediate_size is 48; the FFN of ")
    for kind, fields in (("granular", {"granularity": 2, "logit_std": 1.0}), ("split", {})):
        (tmp_path / kind).mkdir()
        upcycle(dense_checkpoint, tmp_path / kind, settings(kind=kind, **fields), 0, quiet)
        said = refusal(tmp_path / kind, dense_checkpoint, tmp_path / f"{kind}-grown")
        assert re.search(
            r"is (24|12); the FFN of .* is 48 wide; both must be equal: no expert can be added to granular or split",
            said,
        )


def test_what_is_sparse_or_dense_or_t5_by_mistake_is_one_line(
    make_dense: Make, mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    said = refusal(mixture_checkpoint, mixture_checkpoint, tmp_path / "1")
    assert "MixtralForCausalLM (mixtral) is a mixture of experts already; give a dense model" in said
    said = refusal(dense_checkpoint, dense_checkpoint, tmp_path / "2")
    assert re.search(r"model_type is llama; an expert can be added to mixtral, .*lfm2_moe; upcycle it first$", said)
    t5 = make_dense(architecture="T5ForConditionalGeneration")
    (tmp_path / "switch").mkdir()
    upcycle(t5, tmp_path / "switch", settings(k=1), 0, quiet)
    said = refusal(tmp_path / "switch", t5, tmp_path / "3")
    assert re.search(r"model_type is switch_transformers; an expert can be added to mixtral, .*lfm2_moe$", said)


def test_a_base_is_for_adapters_and_adapters_need_one(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    said = refusal(mixture_checkpoint, dense_checkpoint, tmp_path / "1", base=dense_checkpoint)
    assert (
        said
        == f"{dense_checkpoint}: is a whole checkpoint, and base is {dense_checkpoint}; give a base to adapters alone"
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert f"{adapter}: is an adapter, and no base is given; give the dense model" in refusal(
        mixture_checkpoint, adapter, tmp_path / "2"
    )


def test_a_tensor_that_is_missing_is_one_line(mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture_checkpoint, tmp_path / "small")
    state = load_file(tmp_path / "small" / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    del state[name]
    save_file(state, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    said = refusal(tmp_path / "small", dense_checkpoint, tmp_path / "none")
    assert said.startswith(f"{tmp_path}/small: tensor '{name}' is missing; by config.json it must have shape [32, 48];")


def test_the_command_adds_an_expert_and_never_writes_over_what_is_there(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "law"
    shutil.copytree(dense_checkpoint, dense)
    (dense / "config.json").write_text(json.dumps(config(dense) | {"eos_token_id": 7}))
    arguments = ("add-expert", mixture_checkpoint, dense, tmp_path / "grown", "--router", "normal", "--seed", 3)
    result = dense2moe(*arguments)
    assert result.exit_code == 0, result.output
    grow(mixture_checkpoint, dense, tmp_path / "other", kind="normal", seed=3)
    for file in (tmp_path / "other").iterdir():
        assert (tmp_path / "grown" / file.name).read_bytes() == file.read_bytes()
    assert f"{dense}: eos_token_id is 7; the mixture has the base's, 1" in result.output
    counted = sum(parameter.numel() for parameter in load(tmp_path / "grown").parameters())
    new = 2 * (3 * 32 * 48 + 32)
    assert f"{tmp_path / 'grown'}: 5 experts in 2 layers, {counted:,} parameters, {new:,} of them new" in result.output
    again = dense2moe(*arguments)
    assert again.exit_code == 1
    assert "exists already; must be a new directory" in again.output
