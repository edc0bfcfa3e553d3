"""Bits chosen by measurement.

What a choice costs is what transformers says, and no other choice is better in bytes and cost both.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.bit_search import BitChoices, find_units
from dense2moe.export.quantization.bits import plan_classes
from dense2moe.export.quantization.config import BitsOverride, QuantizeConfig
from dense2moe.export.quantization.facts import Sensitivity, Unit
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.sensitivity import Ruler
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

NAMES = {
    "experts": "model.layers.{}.block_sparse_moe.experts.1.w2.weight",
    "attention": "model.layers.{}.self_attn.k_proj.weight",
}


EXACT = OnnxConfig(activation_bits=32, lowering="grouped")


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(directory: Path, seed: int = 0, **fields: Any) -> Path:
    """A mixture whose first layer's attention matters most: its weights are the largest."""
    small = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(MixtralConfig(**small | fields))
    model.save_pretrained(directory)
    return directory


def draw_blocks(count: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 96, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def judge(
    directory: Path,
    blocks: torch.Tensor,
    reference: Path | None = None,
    replaced: dict[str, torch.Tensor] | None = None,
) -> tuple[float, float]:
    """Loss and KL from the reference by whole models of transformers, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
        for path in (reference or directory, directory)
    ]
    for name, weight in (replaced or {}).items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        if "w2" in name:
            models[1].model.layers[layer].mlp.experts.down_proj.data[1] = weight
        else:
            models[1].get_parameter(name).data = weight
    log_p, log_q = (model.eval()(blocks).logits.double().log_softmax(-1) for model in models)
    loss = -log_q[:, :-1].gather(-1, blocks[:, 1:, None]).mean()
    return float(loss), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_those_of_whole_models_of_transformers(tied: bool, tmp_path: Path) -> None:
    source, blocks = make_mixture(tmp_path / "source", tie_word_embeddings=tied), draw_blocks()
    checkpoint = open_checkpoint(source)
    ruler = Ruler(checkpoint, blocks)
    names = [*(pattern.format(layer) for pattern in NAMES.values() for layer in (0, 2)), "model.embed_tokens.weight"]
    if not tied:
        names.append("lm_head.weight")
    replaced = {
        name: checkpoint.read(name)
        + 0.05 * torch.randn(checkpoint.entries[name].shape, generator=torch.Generator().manual_seed(2))
        for name in names
    }
    found = ruler.measure(replaced)
    assert (found.loss, found.kl) == pytest.approx(judge(source, blocks, replaced=replaced), rel=1e-4)
    assert ruler.measure({}).kl == pytest.approx(0, abs=1e-6)

    outside = {name: weight for name, weight in replaced.items() if "layers" not in name}
    for weights, cost in zip([outside, {}], ruler.measure_outside([outside, {}]), strict=True):
        assert (cost.loss, cost.kl) == pytest.approx(judge(source, blocks, replaced=weights), rel=1e-4, abs=1e-6)

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        states = model(blocks, output_hidden_states=True).hidden_states
    inside = [{name: replaced[name]} for name in names if ".2." in name]
    costs, after = ruler.measure_layer(2, states[2], inside)
    for weights, cost in zip(inside, costs, strict=True):
        assert (cost.loss, cost.kl) == pytest.approx(judge(source, blocks, replaced=weights), rel=1e-4)
    torch.testing.assert_close(model.model.norm(after), states[3], rtol=1e-4, atol=1e-5)


def draw_choices(seed: int) -> tuple[BitChoices, list[Sensitivity], dict[Unit, tuple[str, ...]]]:
    """Six units of three options, with costs that are no multiples of each other.

    Some options are worse than a cheaper one.
    """
    generator = torch.Generator().manual_seed(seed)
    units = {Unit(layer, "experts"): (f"tensor {layer}",) for layer in range(6)}
    found = []
    for unit in units:
        kls = torch.rand(3, generator=generator) * torch.tensor([1.0, 0.2, 0.1])
        sizes = torch.randint(10, 100, (), generator=generator) * torch.tensor([4, 8, 16])
        found += [
            Sensitivity(unit, bits, int(size), float(kl)) for bits, size, kl in zip((4, 8, 16), sizes, kls, strict=True)
        ]
    return BitChoices({}, units, found), found, units


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_beats_one_of_the_front(seed: int) -> None:
    choices, sensitivities, units = draw_choices(seed)
    options = {(s.unit, s.bits): s for s in sensitivities}
    every = []
    for bits in itertools.product((4, 8, 16), repeat=len(units)):
        chosen = [options[unit, b] for unit, b in zip(units, bits, strict=True)]
        every.append((sum(s.num_bytes for s in chosen), sum(s.kl for s in chosen)))
    sizes = []
    for count in range(len(choices.upgrades) + 1):
        plan = choices.plan(count)
        chosen = [options[unit, plan[name]] for unit, (name,) in units.items()]
        size, kl = sum(s.num_bytes for s in chosen), sum(s.kl for s in chosen)
        assert kl == pytest.approx(min(cost for num_bytes, cost in every if num_bytes <= size)), f"{count} upgrades"
        sizes.append(size)
    assert sizes == sorted(sizes)

    def count_bytes(plan: Any) -> int:
        return sum(options[unit, plan[name]].num_bytes for unit, (name,) in units.items())

    for budget in range(sizes[0], sizes[-1], 97):
        plan = choices.plan_of(choices.fill(budget, count_bytes))
        size, kl = count_bytes(plan), sum(options[unit, plan[name]].kl for unit, (name,) in units.items())
        assert size <= budget
        on_front = max(count for count, found in enumerate(sizes) if found <= budget)
        least = choices.plan(on_front)
        assert kl <= sum(options[unit, least[name]].kl for unit, (name,) in units.items()) + 1e-12


def search(source: Path, output: Path, held_out: torch.Tensor, method: str = "search", **fields: Any) -> Any:
    output.mkdir()
    config = QuantizeConfig.model_validate({"method": method, "block_size": 16, **fields})
    return quantize_checkpoint(
        source, output, "mixed", config, silent, QuantizeInputs(blocks=draw_blocks(8, seed=5), held_out=held_out)
    )


@pytest.mark.parametrize(("tied", "budgets"), [(True, (820_000, 1_100_000)), (False, (950_000,))])
def test_a_budget_holds_on_the_disk_and_is_used(tied: bool, budgets: tuple[int, ...], tmp_path: Path) -> None:
    source, held_out = (
        make_mixture(tmp_path / "source", tie_word_embeddings=tied, hidden_size=128, intermediate_size=160),
        draw_blocks(),
    )
    sizes, costs = [], []
    for budget in budgets:
        facts = search(source, tmp_path / f"twin {budget}", held_out, budget=budget)
        package = tmp_path / f"package {budget}"
        package.mkdir()
        written = write_package(tmp_path / f"twin {budget}", package, EXACT, silent)
        assert written.package_bytes <= budget
        chosen = [point for point in facts.search.points if point.chosen]
        assert len(chosen) == 1
        assert written.package_bytes <= chosen[0].package_bytes <= budget
        loss, kl = judge(tmp_path / f"twin {budget}", held_out, source)
        assert chosen[0].figures[0].name == facts.search.reference_figures[0].name == "perplexity"
        assert math.log(chosen[0].figures[0].value) == pytest.approx(loss, rel=1e-5)
        assert math.log(facts.search.reference_figures[0].value) == pytest.approx(judge(source, held_out)[0], rel=1e-5)
        sizes.append(written.package_bytes)
        costs.append(kl)
        widths = set(Twin(tmp_path / f"twin {budget}").scheme["tensors"].values())
        assert widths <= {4, 8}
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert sizes[-1] > 0.8 * budgets[-1]

    decoder, blocks = Decoder(tmp_path / f"package {budgets[-1]}", inspection=Inspection(streams=True)), held_out[:2]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"twin {budgets[-1]}", dtype=torch.float32)(
            blocks
        ).logits
    found = torch.from_numpy(decoder.run(decoder.new_cache(*blocks.shape), blocks.numpy())["logits"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_limit_of_perplexity_holds_for_the_twin_and_fewer_bits_would_break_it(method: str, tmp_path: Path) -> None:
    source, held_out = make_mixture(tmp_path / "source", num_hidden_layers=2), draw_blocks()
    loose = search(source, tmp_path / "loose", held_out, method, max_perplexity_increase="20 %")
    tight = search(source, tmp_path / "tight", held_out, method, max_perplexity_increase=0.002)
    reference = judge(source, held_out)[0]
    assert math.expm1(judge(tmp_path / "loose", held_out)[0] - reference) <= 0.20
    assert math.expm1(judge(tmp_path / "tight", held_out)[0] - reference) <= 0.002
    chosen_loose, chosen_tight = (
        next(point for point in facts.search.points if point.chosen) for facts in (loose, tight)
    )
    # GPTQ's least squares shrink what noise is in, which lowers the perplexity of tokens drawn evenly: both limits may
    # hold in 4 bits everywhere.
    assert chosen_loose.package_bytes < chosen_tight.package_bytes or (
        method == "gptq" and chosen_loose == chosen_tight
    )
    assert loose.search.limit == "perplexity at most 20.000% higher"
    assert tight.quantized_expert_share == 1.0


def test_overrides_raise_the_bits_of_their_layers_alone(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    overrides = (
        {"tensors": "experts", "layers": [0], "bits": 8},
        {"tensors": "attention", "layers": [1, 2], "bits": 16},
    )
    config = QuantizeConfig.model_validate({"method": "search", "attention_bits": "variant", "overrides": overrides})
    for variant, own in (("int4", 4), ("int8", 8)):
        (tmp_path / variant).mkdir()
        facts = quantize_checkpoint(source, tmp_path / variant, variant, config, silent)  # type: ignore[arg-type]
        bits = Twin(tmp_path / variant).scheme["tensors"]
        for layer in range(3):
            assert bits[NAMES["experts"].format(layer)] == (8 if layer == 0 else own)
            assert bits.get(NAMES["attention"].format(layer), 32) == (own if layer == 0 else 32)
        assert facts.bits["experts"] == pytest.approx((8 + own + own) / 3, abs=1e-3)
        (tmp_path / f"{variant} package").mkdir()
        write_package(tmp_path / variant, tmp_path / f"{variant} package", OnnxConfig(), silent)


def test_experts_as_floats_beside_quantized_ones_are_no_fused_operator(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    (tmp_path / "twin").mkdir()
    config = QuantizeConfig(method="search", overrides=(BitsOverride(tensors="experts", layers=(1,), bits=16),))
    facts = quantize_checkpoint(source, tmp_path / "twin", "int4", config, silent)
    assert facts.quantized_expert_share == pytest.approx(2 / 3)
    message = "export.lowering 'fused' cannot express layers with quantized experts beside layers without; use 'auto'"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        write_package(tmp_path / "twin", tmp_path, OnnxConfig(lowering="fused"), silent)
    (tmp_path / "package").mkdir()
    assert write_package(tmp_path / "twin", tmp_path / "package", OnnxConfig(), silent).lowering in (
        "grouped",
        "unrolled",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"budget": "90 kB"},
            r"quantize.budget is 90,000 bytes; the fewest bits everywhere take \d{3},\d{3}; raise it to more than that",
        ),
        (
            {"max_perplexity_increase": 0},
            r"quantize.max_perplexity_increase is 0.000%; with experts in 8 bits and the rest as floats perplexity "
            r"on the validation text rises by "
            r"0.\d{3}%; raise the limit, or let quantize.overrides keep experts of some layers as floats",
        ),
        (
            {"budget": "1 GB", "overrides": [{"tensors": "experts", "layers": [3], "bits": 8}]},
            r"quantize.overrides\[0\].layers has 3; the model's layers are 0 to 2; correct it",
        ),
    ],
)
def test_limits_that_cannot_be_kept_are_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"^{message}$"):
        search(make_mixture(tmp_path / "source", seed=3), tmp_path / "twin", draw_blocks(), **fields)


def test_units_hold_every_tensor_that_may_be_quantized_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_mixture(tmp_path / "source"))
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    units = find_units(plan_classes(checkpoint.config, shapes), shapes)
    assert [unit.label for unit in units] == [
        "embedding",
        "head",
        *(f"{kind} of layer {n}" for n in range(3) for kind in ("attention", "experts")),
    ]
    names = [name for group in units.values() for name in group]
    assert sorted(names) == sorted(name for name in shapes if "norm" not in name and "gate.weight" not in name)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("budget", "0.6 GB", 600_000_000),
        ("budget", "512MiB", 1 << 29),
        ("budget", 123, 123),
        ("max_perplexity_increase", "1 %", 0.01),
        ("max_perplexity_increase", "0.25%", 0.0025),
        ("max_perplexity_increase", 0.5, 0.5),
    ],
)
def test_sizes_and_percentages_are_written_as_people_do(field: str, value: Any, expected: float) -> None:
    assert getattr(QuantizeConfig.model_validate({field: value}), field) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("budget", "0.6", "must be a size such as '0.6 GB'"),
        ("budget", "1 gb", "must be a size"),
        ("budget", "0 B", "greater than 0"),
        ("budget", -1, "greater than 0"),
        ("max_perplexity_increase", "one %", "is 'one %'; must be a percentage such as '1 %'"),
        ("max_perplexity_increase", "-1 %", "must be a percentage"),
        ("max_perplexity_increase", -0.1, "greater than or equal to 0"),
    ],
)
def test_other_sizes_and_percentages_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizeConfig.model_validate({field: value})
