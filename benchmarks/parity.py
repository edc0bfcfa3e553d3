"""What parity names of planted faults, and how often it is wrong about correct exports.

    python benchmarks/parity.py       # false alarms over 50 seeds, and how far float32 is from each limit
    python benchmarks/parity.py --seeds 10 --variants int8,int4 --families 'qwen3|granite'
    python benchmarks/parity.py --faults --exporters foreign --variants int8 --only 'cache|padding'

With `--faults` every fault of `tests/faults.py` is planted in every variant of one model, exported by us and by others;
a line says what parity says first of it that it does not say of the package without it. Else every seed is another tiny
model of each family (layers, widths, experts, window, lowering and bits of activations change with it), and some models
that are hard to judge: routers of zeros, and depth. Of float32 Mixtrals the second table is the largest error over the
noise of float32 in the same place, tier by tier: what `parity.noise_multiple` has to leave room for.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from transformers import (
    AutoModelForCausalLM,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig, rounds_activations
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.inside.meter import LEAST_NOISE
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.precision import find_precision
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.variant import Variant

if TYPE_CHECKING:
    from tests.faults.planted import Exported, Fault
    from tests.foreign import Kind

LOWERINGS = ("fused", "grouped", "unrolled")
ROTATION: tuple[Literal["fused", "grouped", "unrolled", "switched"], ...] = ("fused", "grouped", "unrolled", "switched")
VARIANTS: tuple[Variant, ...] = ("float32", "float16", "int8", "int8-qdq", "int4", "mixed")
Exporter = Literal["ours", "foreign", "fused"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)
"""Ours; transformers' exporter with onnxruntime's quantizer and converter.

And the same after transformers' fusions for onnxruntime.
"""

BLOCK = 32
LOOSE = ParityConfig(max_perplexity_increase={}, free_tokens=8)
"""Models are random: what quantizing costs is not asked here."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


# The ratios of float32.


def make_mixture(directory: Path, seed: int) -> Path:
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=(32, 64)[seed % 2],
        intermediate_size=48,
        num_hidden_layers=2 + seed % 3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=(4, 8)[seed // 2 % 2],
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=(None, 20)[seed // 3 % 2],
        initializer_range=0.2,
        tie_word_embeddings=seed % 2 == 0,
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def judge(seed: int, folder: Path) -> tuple[ProviderParity, tuple[str, ...]]:
    """One correct export, judged on random tokens."""
    source, twin, package = make_mixture(folder / "source", seed), folder / "twin", folder / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(source, twin, "float32", QuantizeConfig(), silent)
    write_package(twin, package, OnnxConfig(lowering=LOWERINGS[seed % len(LOWERINGS)]), silent)
    blocks = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(seed))
    parity = check_parity(ParitySubject(package, twin, source, blocks, "float32", False), ParityConfig(), silent)
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return result, parity.breaches


def find_ratios(result: ProviderParity) -> dict[str, float]:
    """The largest error over the noise of float32 in the same place.

    Of logits, and of each kind of place whose noise was measured.
    """
    assert not isinstance(result.noise, str)
    ratios: dict[str, float] = defaultdict(float)
    ratios["logits"] = max(check.relative_error for check in result.checks) / result.noise.logits
    for place in result.places:
        assert not isinstance(place, str)
        if place.noise is not None:
            ratios[place.part] = max(ratios[place.part], place.error / max(place.noise, LEAST_NOISE))
    return dict(ratios)


# Correct exports of many families.


def sizes(seed: int) -> dict[str, Any]:
    """What every config has; widths that blocks of 32 divide, so that any lowering can be."""
    return {
        "vocab_size": 300,
        "hidden_size": (32, 64)[seed % 2],
        "intermediate_size": (96, 64)[seed // 2 % 2],
        "num_hidden_layers": 2 + seed % 3,
        "num_attention_heads": 4,
        "num_key_value_heads": (2, 4)[seed // 2 % 2],
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": seed % 2 == 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def routing(seed: int) -> dict[str, Any]:
    return {
        "num_experts": (4, 8)[seed // 2 % 2],
        "num_experts_per_tok": (2, 1, 3)[seed % 3],
        "norm_topk_prob": seed % 4 != 3,
    }


def mixtral(seed: int) -> PreTrainedConfig:
    return MixtralConfig(
        **sizes(seed),
        num_local_experts=(4, 8)[seed // 2 % 2],
        num_experts_per_tok=2,
        sliding_window=(None, 20)[seed // 3 % 2],
    )


def qwen2_moe(seed: int) -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **sizes(seed), **routing(seed), moe_intermediate_size=64, shared_expert_intermediate_size=(64, 32)[seed % 2]
    )


def qwen3_moe(seed: int) -> PreTrainedConfig:
    return Qwen3MoeConfig(**sizes(seed), **routing(seed), moe_intermediate_size=64, head_dim=(16, 24)[seed % 2])


def granitemoe(seed: int) -> PreTrainedConfig:
    return GraniteMoeConfig(
        **sizes(seed),
        num_local_experts=(4, 8)[seed // 2 % 2],
        num_experts_per_tok=2,
        embedding_multiplier=6.0,
        attention_multiplier=0.3,
        residual_multiplier=0.4,
        logits_scaling=4.0,
    )


def granitemoeshared(seed: int) -> PreTrainedConfig:
    return GraniteMoeSharedConfig(
        **granitemoe(seed).to_diff_dict() | {"shared_intermediate_size": (64, 32)[seed % 2]},
    )


def flex_olmo(seed: int) -> PreTrainedConfig:
    return FlexOlmoConfig(**sizes(seed), **routing(seed))


def glm4_moe(seed: int) -> PreTrainedConfig:
    own = routing(seed)
    return Glm4MoeConfig(
        **sizes(seed),
        n_routed_experts=own["num_experts"],
        num_experts_per_tok=own["num_experts_per_tok"],
        norm_topk_prob=own["norm_topk_prob"],
        head_dim=16,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        partial_rotary_factor=1.0,
        attention_bias=seed % 2 == 0,
    )


def llama(seed: int) -> PreTrainedConfig:
    return LlamaConfig(**sizes(seed), attention_bias=seed % 2 == 0)


def deep(seed: int) -> PreTrainedConfig:
    return MixtralConfig(
        **sizes(seed) | {"num_hidden_layers": 12, "initializer_range": 0.5}, num_local_experts=4, num_experts_per_tok=2
    )


def scale_routers(model: torch.nn.Module, factor: float) -> None:
    """Make routers small, or zero: then all experts tie, and differ."""
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.layer.weight", "block_sparse_moe.gate.weight")):
            parameter.data.mul_(factor)


class Family(NamedTuple):
    """Configs by seed, and what is done to a random model of them."""

    config: Callable[[int], PreTrainedConfig]
    change: Callable[[torch.nn.Module], None] = lambda _: None


FAMILIES: dict[str, Family] = {
    "mixtral": Family(mixtral),
    "qwen2_moe": Family(qwen2_moe),
    "qwen3_moe": Family(qwen3_moe),
    "granitemoe": Family(granitemoe),
    "granitemoeshared": Family(granitemoeshared),
    "flex_olmo": Family(flex_olmo),
    "glm4_moe": Family(glm4_moe),
    "llama": Family(llama),
    "mixtral, zero routers": Family(mixtral, lambda model: scale_routers(model, 0.0)),
    "mixtral, routers × 1e-6": Family(mixtral, lambda model: scale_routers(model, 1e-6)),
    "qwen2_moe, zero routers": Family(qwen2_moe, lambda model: scale_routers(model, 0.0)),
    "mixtral, 12 layers of std 0.5": Family(deep),
}


def make_model(family: Family, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family.config(seed), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand(buffer.shape) * 0.4 - 0.2)
    family.change(model)
    model.save_pretrained(directory)
    return directory


def draw_blocks(seed: int, count: int = 4, length: int = 48) -> torch.Tensor:
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(seed))


def export(source: Path, folder: Path, variant: Variant, lowering: str, activation_bits: int) -> tuple[Path, Path, str]:
    """The twin, the package and the lowering that it has.

    The wished one, or `grouped` where that cannot express the layers.
    """
    twin, package = folder / "twin", folder / "package"
    twin.mkdir(parents=True)
    package.mkdir()
    search = {"max_perplexity_increase": 0.3, "search_tokens": 192} if variant == "mixed" else {}
    settings = QuantizeConfig.model_validate({"method": "round", "block_size": BLOCK, **search})
    text = draw_blocks(1000, 8)
    quantize_checkpoint(
        source,
        twin,
        variant,
        settings,
        silent,
        QuantizeInputs(activation_bits=activation_bits, blocks=text if variant == "int8-qdq" else None, held_out=text),
    )
    wishes = [
        OnnxConfig.model_validate({"lowering": wish, "activation_bits": activation_bits})
        for wish in (lowering, "grouped")
    ]
    try:
        return twin, package, write_package(twin, package, wishes[0], silent).lowering
    except ExportError:
        return twin, package, write_package(twin, package, wishes[1], silent).lowering


class Verdict(NamedTuple):
    """What parity said, or how it ended, and the seconds that it took."""

    breaches: tuple[str, ...]
    seconds: float
    result: ProviderParity | None = None


def ask_parity(
    package: Path, twin: Path, source: Path, blocks: torch.Tensor, variant: Variant, rounds: bool
) -> Verdict:
    """A package judged by its twin; an exception is a breach of its own kind."""
    start = time.monotonic()
    try:
        parity = check_parity(ParitySubject(package, twin, source, blocks, variant, rounds), LOOSE, silent)
    except Exception as error:
        first = str(error).strip().splitlines()
        return Verdict((f"EXCEPTION {type(error).__name__}: {first[0] if first else ''}",), time.monotonic() - start)
    result = parity.providers.get(CPU)
    return Verdict(parity.breaches, time.monotonic() - start, result if isinstance(result, ProviderParity) else None)


def judge_correct(family: str, seed: int, variant: Variant, folder: Path) -> tuple[Verdict, str]:
    """One correct export of a family in a variant, and how it was written."""
    source = folder / "source"
    if not source.is_dir():
        make_model(FAMILIES[family], source, seed)
    bits = (8, 8, 32)[seed % 3]
    twin, package, lowering = export(source, folder / variant, variant, ROTATION[seed % len(ROTATION)], bits)
    rounds = rounds_activations(variant, OnnxConfig(activation_bits=32 if bits == 32 else 8))
    return ask_parity(package, twin, source, draw_blocks(seed), variant, rounds), f"{lowering}, {bits}-bit activations"


def count_alarms(seeds: range, variants: Sequence[Variant], families: Sequence[str]) -> None:
    alarms: dict[tuple[Variant, str], int] = defaultdict(int)
    start = time.monotonic()
    for seed in seeds:
        for family in families:
            with tempfile.TemporaryDirectory() as folder:
                for variant in variants:
                    verdict, how = judge_correct(family, seed, variant, Path(folder))
                    alarms[variant, family] += bool(verdict.breaches)
                    for line in verdict.breaches:
                        print(f"seed {seed}, {family}, {variant}, {how}: {line}", flush=True)
    print(f"\nFalse alarms over {len(seeds)} seeds each ({time.monotonic() - start:.0f} s)\n")
    print(f"| family | {' | '.join(variants)} |\n|---|{'--:|' * len(variants)}")
    for family in families:
        print(f"| {family} | {' | '.join(str(alarms[variant, family]) for variant in variants)} |")


def print_ratios(seeds: range) -> None:
    found: dict[str, list[float]] = defaultdict(list)
    alarms, flips = 0, 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result, breaches = judge(seed, Path(folder))
        alarms += bool(breaches)
        flips += sum(check.num_tie_flips for check in result.checks)
        for line in breaches:
            print(f"seed {seed}: {line}")
        for tier, ratio in find_ratios(result).items():
            found[tier].append(ratio)
    print(f"\n{alarms} of {len(seeds)} correct float32 exports raised an alarm; {flips} near-tie flips")
    print("\n| error over float32's noise | median | largest |\n|---|--:|--:|")
    for tier, ratios in found.items():
        print(f"| {tier} | {statistics.median(ratios):.2f} | {max(ratios):.2f} |")


# Faults.


def make_packages(
    exporter: Exporter, variant: Variant, kind: Kind, folder: Path, bits: int, lowering: str
) -> tuple[Exported, bool]:
    """A correct package and its twin, and whether it rounds activations; each exporter's model is the same one."""
    from tests.faults.planted import Exported
    from tests.foreign import make_checkpoint, make_foreign

    source = folder / "source"
    if not source.is_dir():
        make_checkpoint(kind, source, num_hidden_layers=3)
    if exporter == "ours":
        twin, package, _ = export(source, folder / f"ours-{variant}", variant, lowering, bits)
        return Exported(source, twin, package), rounds_activations(
            variant, OnnxConfig(activation_bits=32 if bits == 32 else 8)
        )
    made = make_foreign(
        kind, variant, folder, accuracy=4 if bits == 8 else 0, fusions="cpu" if exporter == "fused" else None
    )
    return made, find_precision(made.package).rounds_activations


def judge_faults(
    exported: Exported, variant: Variant, rounds: bool, blocks: torch.Tensor, only: str
) -> Iterator[tuple[str, str, str]]:
    """Fault, verdict and first breach: of the correct package, and of each faulty one."""
    from tests.faults.planted import FAULTS, plant
    from tests.faults.stores import Inexpressible

    right = ask_parity(exported.package, exported.twin, exported.source, blocks, variant, rounds)
    yield "(none)", "ALARM" if right.breaches else "passed", as_cell(right.breaches)
    alarms = {without_numbers(line) for line in right.breaches}
    for fault in FAULTS.values():
        if not re.search(only, fault.words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                faulty = plant(exported, Path(folder), fault, blocks)
            except Inexpressible as error:
                yield fault.words, "not expressible", str(error)
                continue
            except Exception as error:
                yield fault.words, "not planted", f"{type(error).__name__}: {error}"
                continue
            found = ask_parity(faulty.package, faulty.twin, faulty.source, blocks, variant, rounds)
        breaches = tuple(line for line in found.breaches if without_numbers(line) not in alarms)
        yield fault.words, judge_breaches(fault, breaches), as_cell(breaches)


def judge_breaches(fault: Fault, breaches: tuple[str, ...]) -> str:
    """Named by the first of them, by a later one, only found, or missed."""
    if not breaches:
        return "MISSED"
    if breaches[0].startswith("EXCEPTION"):
        return "EXCEPTION"
    named = [fault.is_named(line) for line in breaches]
    return "named" if named[0] else "named later" if any(named) else "found"


def without_numbers(line: str) -> str:
    """What a breach is about, whatever its figures."""
    return re.sub(r"\d[\d.]*(e[-+]\d+)?", "…", line)


def as_cell(breaches: tuple[str, ...]) -> str:
    """The first breach, as a cell of a table."""
    return f"`{breaches[0].replace('|', '/')}`" if breaches else ""


def print_faults(
    exporters: Sequence[Exporter], variants: Sequence[Variant], kind: Kind, only: str, bits: int, lowering: str
) -> None:
    blocks = draw_blocks(0)
    counts: dict[tuple[Exporter, Variant], Counter[str]] = defaultdict(Counter)
    print("| fault | exporter | variant | verdict | first breach |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for exporter in exporters:
            for variant in variants:
                try:
                    exported, rounds = make_packages(exporter, variant, kind, Path(folder), bits, lowering)
                except (ValueError, ExportError) as error:
                    print(f"| | {exporter} | {variant} | not made | {error} |", flush=True)
                    continue
                for words, verdict, first in judge_faults(exported, variant, rounds, blocks, only):
                    print(f"| {words} | {exporter} | {variant} | {verdict} | {first} |", flush=True)
                    counts[exporter, variant][verdict] += 1
    print()
    for (exporter, variant), found in counts.items():
        print(f"{exporter}, {variant}: {', '.join(f'{number} {verdict}' for verdict, number in found.most_common())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="correct exports of each family and variant")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true", help="plant faults instead")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="also bfloat16, which is ours alone, as int8-qdq is"
    )
    parser.add_argument("--families", default="", help="a regular expression of: " + "; ".join(FAMILIES))
    parser.add_argument("--exporters", default="ours,foreign", help=", ".join(EXPORTERS))
    parser.add_argument(
        "--kind",
        default="mixtral",
        choices=["llama", "mixtral", "qwen2_moe"],
        help="the model that faults are planted in",
    )
    parser.add_argument("--only", default="", help="a regular expression of faults")
    parser.add_argument("--activation-bits", type=int, default=8, choices=[8, 32], help="with --faults")
    parser.add_argument("--lowering", default="grouped", choices=ROTATION, help="of our exports with --faults")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where tests/faults.py is
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    variants, exporters = choose(arguments.variants, get_args(Variant)), choose(arguments.exporters, EXPORTERS)
    if arguments.faults:
        print_faults(exporters, variants, arguments.kind, arguments.only, arguments.activation_bits, arguments.lowering)
        return
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    families = [family for family in FAMILIES if re.search(arguments.families, family)]
    count_alarms(seeds, variants, families)
    if "float32" in variants and "mixtral" in families:
        print_ratios(seeds)


def choose(text: str, known: Sequence[Any]) -> tuple[Any, ...]:
    """What a list on the command line names."""
    found = tuple(part.strip() for part in text.split(","))
    strange = sorted(set(found) - set(known))
    if strange:
        raise SystemExit(f"{strange[0]!r} is none of {', '.join(known)}")
    return found


if __name__ == "__main__":
    main()
