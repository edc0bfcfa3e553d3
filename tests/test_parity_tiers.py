"""Each tier's figures equal those computed a second way, from transformers' own outputs."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.agreement import MARGIN_BOUNDS
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Forward, open_reference
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.limits import measure_noise
from dense2moe.export.parity.records import TIERS, ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.ties import TIE_MARGIN, before_flips, find_flips, find_tie_margin
from dense2moe.export.parity.ways.cases import Case, plan_cases
from dense2moe.export.parity.ways.feeding import CaseWatch, _Prefills, measure_errors, run_cases_alone
from dense2moe.export.parity.ways.free_text import run_free
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.gates.gate import TopK

BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CONFIG = ParityConfig(max_perplexity_increase={}, longest_row=48, free_tokens=8)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture in int4, so that experts and greedy text differ from its own.

    Shared: read only; its twin lies beside it.
    """
    return export(mixture_checkpoint, tmp_path_factory.mktemp("int4"), "int4")


def export(checkpoint: Path, folder: Path, variant: Variant) -> Path:
    for name in ("twin", "package"):
        (folder / name).mkdir()
    quantize_checkpoint(checkpoint, folder / "twin", variant, QuantizeConfig(method="round", block_size=16), silent)
    write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped", activation_bits=32), silent)
    return folder / "package"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


@torch.inference_mode()
def outputs_of(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, S, V] and router logits [layers, N, S, E], as transformers itself gives them."""
    found = load(directory, dtype)(BLOCKS, output_router_logits=True, output_hidden_states=True)
    return found.logits.double(), torch.stack(
        [layer.reshape(*BLOCKS.shape, -1) for layer in found.router_logits]
    ).double()


def judge(package: Path, twin: Path, finetuned: Path, variant: Variant = "int4") -> ProviderParity:
    result = check_parity(ParitySubject(package, twin, finetuned, BLOCKS, variant, False), CONFIG, silent).providers[
        CPU
    ]
    assert isinstance(result, ProviderParity)
    return result


def test_figures_of_language_and_routing_equal_those_of_transformers(package: Path, mixture_checkpoint: Path) -> None:
    result = judge(package, package.parent / "twin", mixture_checkpoint).finetuned
    ours, our_routers = outputs_of(package.parent / "twin")  # the package computes what its twin does
    theirs, their_routers = outputs_of(mixture_checkpoint)
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    chosen, true = (
        [set(row.tolist()) for row in routers.topk(2).indices.reshape(-1, 2)]
        for routers in (our_routers, their_routers)
    )
    same = torch.tensor([a == b for a, b in zip(chosen, true, strict=True)]).reshape(2, *BLOCKS.shape)
    flipped = ~same.all(0)
    assert 0 < flipped.sum() < BLOCKS.numel()
    assert result.flipped_share == pytest.approx(float(flipped.double().mean()))
    assert result.kl_flipped == pytest.approx(float(kl[flipped].mean()), rel=1e-4)
    assert result.kl_unflipped == pytest.approx(float(kl[~flipped].mean()), rel=1e-4)
    best, true_best = (
        [set(row.tolist()) for row in logits.topk(5).indices.reshape(-1, 5)] for logits in (ours, theirs)
    )
    assert result.top5_agreement == pytest.approx(
        sum(len(a & b) for a, b in zip(best, true_best, strict=True)) / 5 / len(best)
    )
    assert result.routing_agreement == pytest.approx(same.double().mean((1, 2)).tolist())
    ordered = their_routers.sort(-1, descending=True).values
    margin = ordered[..., 1] - ordered[..., 2]
    for found, least, below in zip(result.margins, MARGIN_BOUNDS, [*MARGIN_BOUNDS[1:], math.inf], strict=True):
        inside = (margin >= least) & (margin < below)
        assert found.num_choices == int(inside.sum())
        assert found.agreement == (pytest.approx(float(same[inside].double().mean())) if inside.any() else None)
    assert sum(found.num_choices for found in result.margins) == same.numel()


@pytest.fixture(scope="module")
def biased(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose gates have selection biases that choose other experts than their scores do. Shared: read only."""
    directory = tmp_path_factory.mktemp("biased")
    upcycle(
        dense_checkpoint,
        directory,
        UpcycleConfig(target="glm4_moe", num_experts=4, experts=ExpertsConfig(noise=0.5)),
        0,
        silent,
    )
    return directory


def with_biases(checkpoint: Path, folder: Path, scale: float) -> Path:
    """A copy with selection biases of up to `scale`."""
    shutil.copytree(checkpoint, folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_((torch.rand(4, generator=generator) - 0.5) * 2 * scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.inference_mode()
def choices_of(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that gates chose and those with the largest logits, in order, [layers, tokens, 2].

    As transformers itself has them.
    """
    model, said = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval(), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: said.append((output[2], output[0].topk(2).indices)))
    model(BLOCKS)
    return tuple(torch.stack(found).sort(-1).values for found in zip(*said, strict=True))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_gates_with_a_selection_bias_are_judged_by_what_they_chose(biased: Path, tmp_path: Path) -> None:
    source = with_biases(biased, tmp_path / "source", 0.3)
    package = export(source, tmp_path, "int4")
    result = judge(package, tmp_path / "twin", source)
    (ours, _), (theirs, by_logits) = choices_of(tmp_path / "twin"), choices_of(source)
    assert (theirs == by_logits).all(-1).double().mean() < 0.8
    agreement = (ours == theirs).all(-1).double().mean(1)
    assert result.finetuned.routing_agreement == pytest.approx(agreement.tolist())
    assert min(result.finetuned.routing_agreement) < 1
    assert result.twin.routing_agreement == (1.0, 1.0)
    assert result.tiers == {**dict.fromkeys(TIERS, "passed"), "task": "not run: no task was given"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_a_package_with_other_biases_than_its_twin_is_a_breach(scale: float, biased: Path, tmp_path: Path) -> None:
    """The routers are the same, and so are their logits."""
    package = export(with_biases(biased, tmp_path / "other", scale), tmp_path, "float32")
    source = with_biases(biased, tmp_path / "source", 0.3)
    parity = check_parity(ParitySubject(package, source, source, BLOCKS, "float32", False), CONFIG, silent)
    found = parity.providers[CPU]
    assert isinstance(found, ProviderParity)
    assert {tier for tier, told in found.tiers.items() if told == "broken"} == {
        "weights",
        "operator",
        "logits",
        "language",
        "routing",
    }
    assert isinstance(found.places, tuple)
    assert {check.part for check in found.places if not check.is_right} == {"experts"}
    assert "e_score_correction_bias" in parity.breaches[0]


def test_with_the_routing_forced_another_router_costs_nothing(
    package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    """A twin that differs in its routers alone computes what the fine-tuned model does.

    Once that one's routing is forced on it.
    """
    twin = tmp_path / "other_routers"
    shutil.copytree(mixture_checkpoint, twin)
    tensors = load_file(twin / "model.safetensors")
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name] = tensors[name] + 0.1 * torch.randn(
                tensors[name].shape, generator=torch.Generator().manual_seed(0)
            )
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    forced = judge(package, twin, mixture_checkpoint).forced
    assert not isinstance(forced, str)
    assert forced.kl < 1e-12
    assert forced.kl_free > 1e-3
    assert forced.num_tokens == BLOCKS[0].numel()


def test_weights_cost_what_they_cost_with_the_routing_forced(package: Path, mixture_checkpoint: Path) -> None:
    forced = judge(package, package.parent / "twin", mixture_checkpoint).forced
    assert not isinstance(forced, str)
    ours, theirs = (outputs_of(directory)[0] for directory in (package.parent / "twin", mixture_checkpoint))
    log_p, log_q = theirs[:1].log_softmax(-1), ours[:1].log_softmax(-1)
    assert forced.kl_free == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert 0 < forced.kl < forced.kl_free


def test_the_common_greedy_prefix_is_that_of_generate(package: Path, mixture_checkpoint: Path) -> None:
    """What the package writes is what its twin writes; both are written anew here by transformers' `generate`."""
    with open_reference(mixture_checkpoint) as reference:
        found = run_free(Decoder(package), reference, BLOCKS, 12)
    texts = []
    for directory in (package.parent / "twin", mixture_checkpoint):
        model = load(directory)
        options = {
            "max_new_tokens": 12,
            "min_new_tokens": 12,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 1,
        }
        texts.append(
            torch.stack(
                [model.generate(row[None, :24], attention_mask=torch.ones(1, 24), **options)[0, 24:] for row in BLOCKS]
            )
        )
    differs = (texts[0] != texts[1]).int()
    prefixes = [int(row.argmax()) if row.any() else 12 for row in differs]
    assert (found.num_rows, found.num_tokens) == (4, 12)
    assert found.shortest_prefix == min(prefixes)
    assert found.mean_prefix == pytest.approx(sum(prefixes) / 4)
    assert found.num_diverged == sum(prefix < 12 for prefix in prefixes) > 0
    assert found.largest_gap > 0


def test_noise_is_the_difference_of_two_precisions(mixture_checkpoint: Path) -> None:
    forwards = []
    for dtype in (torch.float64, torch.float32):
        with open_reference(mixture_checkpoint, dtype) as reference:
            forwards.append(reference.forward(BLOCKS, torch.ones_like(BLOCKS)))
    exact, found = forwards
    noise = measure_noise(exact, BLOCKS, found)
    narrow, wide = outputs_of(mixture_checkpoint)[0], outputs_of(mixture_checkpoint, torch.float64)[0]
    assert noise.logits == pytest.approx(float((narrow - wide).abs().max() / wide.abs().max()), rel=1e-6)
    assert 2.0**-26 < noise.logits < 1e-5
    assert noise.num_tokens == BLOCKS.numel()
    assert noise.tie_margin == TIE_MARGIN


def test_noise_of_a_place_is_that_of_its_own_product(package: Path, mixture_checkpoint: Path) -> None:
    """The output matrix of attention, on what the graph's heads attended to: once in float32 and once in float64."""
    places = judge(package, package.parent / "twin", mixture_checkpoint).places
    assert isinstance(places, tuple)
    noise = {(check.layer, check.part): check.noise for check in places}
    weight = load_file(package.parent / "twin" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    name = "layers.1.attention"
    decoder = Decoder(package, inspection=Inspection(values=(name,)))
    row = BLOCKS[:1]
    read = torch.from_numpy(decoder.run(decoder.new_cache(*row.shape, taps=[name]), row.numpy())[name]).reshape(
        row.shape[1], -1
    )
    exact = read.double() @ weight.double().T
    own = float(((read @ weight.T - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    found = noise[1, "attention output"]
    assert found is not None
    assert own / 4 < found < own * 4  # of another text: every expert is visited in it
    assert {part for (_, part), value in noise.items() if value is None} == {
        "embedding",
        "cache",
        "residual stream",
        "final norm",
    }
    assert all(2.0**-28 < value < 1e-5 for value in noise.values() if value is not None)


# Cases.


def names_of(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def test_a_prefill_is_held_no_longer_than_a_later_case_needs_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real model it has hundreds of megabytes of logits, and the longest rows come last."""
    held: list[list[int]] = []
    drop = _Prefills.drop_all_but

    def recorded(prefills: _Prefills, cases: list[Case]) -> None:
        drop(prefills, cases)
        held.append([len(ids) for ids, _ in prefills._known])

    monkeypatch.setattr(_Prefills, "drop_all_but", recorded)
    first, other = BLOCKS[:1, :30], BLOCKS[1:2, :24]
    cases = [
        Case("whole", first, torch.ones_like(first), 30),
        Case("its beginning", first[:, :9], torch.ones_like(first[:, :9]), 9),
        Case("decoded", first, torch.ones_like(first), 20),
        Case("another row, decoded", other, torch.ones_like(other), 16),
    ]
    found = run_cases_alone(Decoder(package), cases, [], CaseWatch([], lambda _: None))
    assert held == [[], [30], [30], []], "before each case: the whole row, until no case begins with it"
    assert [each.case.name for each in found] == [case.name for case in cases]
    assert max(each.check.relative_error for each in found) < 1e-5


def test_rows_end_at_the_tokens_that_are_nearest_to_a_tie() -> None:
    margins = torch.ones(4, 48)
    places = [(2, 30), (0, 5), (3, 47), (1, 12)]
    for n, place in enumerate(places):
        margins[place] = 10.0 ** (n - 6)
    case = plan_cases(BLOCKS, 48, None, margins, CONFIG)[-1]
    assert (
        case.name == "prefill, batch 4, rows that end nearest to a tie of experts (margin at most 1e-03), left padding"
    )
    for (row, column), ids, mask in zip(places, case.ids, case.mask, strict=True):
        assert ids[mask.bool()].tolist() == BLOCKS[row, : column + 1].tolist()
        assert mask[-1] == 1
    alone = plan_cases(BLOCKS, 48, None, margins, CONFIG.model_copy(update={"left_padding": False}))[-1]
    assert alone.name == "prefill, batch 1, rows that end nearest to a tie of experts (margin at most 1e-06)"
    assert alone.ids.tolist() == [BLOCKS[2, :31].tolist()]


def test_rows_go_up_to_the_context_and_past_the_window() -> None:
    wide = ParityConfig(longest_row=1000, decode_steps=8)
    assert names_of(plan_cases(BLOCKS, 100, 20, None, wide))[-3:] == [
        "prefill, batch 1, 100 tokens, the whole context",
        "8 decode steps after 92 tokens, batch 1, the whole context",
        "8 decode steps after 16 tokens, batch 1, across the window of 20",
    ]
    assert names_of(plan_cases(BLOCKS, 4096, None, None, wide))[-2:] == [  # the text ends before the context does
        "prefill, batch 1, 192 tokens, of several blocks",
        "8 decode steps after 184 tokens, batch 1, of several blocks",
    ]
    assert not any(
        "padding" in name
        for name in names_of(plan_cases(BLOCKS, 48, None, None, wide.model_copy(update={"left_padding": False})))
    )


def test_every_case_fits_the_context() -> None:
    for context in (2, 7, 48, 64, 191, 192, 500):
        for case in plan_cases(BLOCKS, context, 5, torch.rand(4, 48), ParityConfig()):
            assert case.ids.shape == case.mask.shape
            assert 1 <= case.num_prefill <= case.ids.shape[1] <= context, case.name


# Flips, on figures made by hand: one layer of three experts, top-1.


def make_forward(routers: list[list[float]], error: float = 0.0) -> Forward:
    logits = torch.tensor([[[10.0, 1.0]] * len(routers)]) + error
    return Forward(logits, (torch.tensor([routers]),), (torch.ones(1, len(routers), 4),), (None,), TopK(1))


def test_the_margin_of_a_near_tie_grows_with_the_noise_and_not_with_flips() -> None:
    true = torch.zeros(1, 1000, 3, dtype=torch.float64)
    noise = torch.full_like(true, 1e-6)
    assert find_tie_margin((true + noise, None), (true, None)) == TIE_MARGIN
    loud = true + 1e-3
    loud[0, :5] = 7.0  # five tokens of a thousand took another path before
    assert find_tie_margin((true + noise, loud), (true, true)) == pytest.approx(8e-3)
    assert find_tie_margin((None,), (None,)) == TIE_MARGIN


def test_what_follows_a_near_tie_flip_is_not_judged_and_a_clear_flip_is() -> None:
    near, clear = [1.0, 1.00005, 0.0], [2.0, 1.0, 0.0]
    ids = mask = torch.ones(1, 3, dtype=torch.int64)
    for theirs, ours, judged in (
        ([clear, near, clear], [clear, [1.0, 0.9999, 0.0], clear], [True, False, False]),
        ([clear, clear, clear], [clear, [1.0, 2.0, 0.0], clear], [True, True, True]),
    ):
        found, expected = make_forward(ours, error=0.5), make_forward(theirs)
        flips = find_flips(found.routers, expected.routers, found.hiddens, expected.hiddens, mask, TopK(1))
        assert before_flips(flips, mask).tolist() == [judged]
        errors = measure_errors(Case("case", ids, mask, 3), found, expected)
        assert errors.check.num_tie_flips == judged.count(False) // 2
        assert errors.check.relative_error == pytest.approx(0.05)  # 0.5 of a largest logit of 10
        assert errors.judge(0.01).first_position == 0
        assert errors.judge(0.1).first_position is None


def test_what_stands_at_padding_is_not_judged() -> None:
    mask, routers = torch.tensor([[0, 1, 1]]), [[2.0, 1.0, 0.0]] * 3
    found, expected = make_forward(routers), make_forward(routers)
    found.logits[0, 0] += 5
    flips = find_flips(found.routers, expected.routers, found.hiddens, expected.hiddens, mask, TopK(1))
    assert before_flips(flips, mask).tolist() == [[False, True, True]]
    errors = measure_errors(Case("case", torch.ones_like(mask), mask, 3), found, expected)
    assert (errors.check.num_tokens, errors.check.relative_error) == (2, 0.0)
    assert errors.judge(0.0).first_position is None


def test_a_reference_leaves_memory_when_it_is_closed(mixture_checkpoint: Path) -> None:
    """Without waiting for the collector of cycles.

    Three models are read one after the other, and a large one fits once.
    """
    gc.disable()
    try:
        with open_reference(mixture_checkpoint) as reference:
            model = weakref.ref(reference.model)
            reference.forward(BLOCKS, torch.ones_like(BLOCKS))
        assert model() is None
    finally:
        gc.enable()
