"""False alarms of parity: correct float32 exports of random mixtures, and how far each tier is from its limit.

Every seed is another tiny Mixtral (layers, widths, experts, window and lowering change with it), exported and judged as a run does it. The table is
the largest error over the noise of float32 in the same place, tier by tier: what `parity.noise_multiple` has to leave room for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from export.config import OnnxConfig, ParityConfig, QuantizeConfig
from export.package import write_package
from export.parity import ProviderParity, check_parity
from export.quantizer import quantize_checkpoint
from export.runtime import CPU

LOWERINGS = ("fused", "grouped", "unrolled")


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(directory: Path, seed: int) -> Path:
    config = MixtralConfig(
        vocab_size=300, hidden_size=(32, 64)[seed % 2], intermediate_size=48, num_hidden_layers=2 + seed % 3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=(4, 8)[seed // 2 % 2], num_experts_per_tok=2, max_position_embeddings=128,
        sliding_window=(None, 20)[seed // 3 % 2], initializer_range=0.2, tie_word_embeddings=seed % 2 == 0,
    )  # fmt: skip
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
    parity = check_parity(package, twin, source, blocks, "float32", False, ParityConfig(), silent)
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return result, parity.breaches


def find_ratios(result: ProviderParity) -> dict[str, float]:
    """The largest error over the noise of float32 in the same place, by tier."""
    assert not isinstance(result.noise, str)
    ratios: dict[str, float] = defaultdict(float)
    ratios["logits"] = max(check.relative_error for check in result.checks) / result.noise.logits
    for layer in result.layers:
        assert not isinstance(layer, str)
        ratios["attention"] = max(ratios["attention"], (layer.attention_error or 0.0) / (layer.attention_noise or 1.0))
        ratios["hidden"] = max(ratios["hidden"], layer.hidden_error / (layer.hidden_noise or 1.0))
    for block in result.operators:
        assert not isinstance(block, str)
        ratios["router"] = max(ratios["router"], block.router_error / (block.router_noise or 1.0))
        ratios["experts"] = max(ratios["experts"], block.output_error / (block.output_noise or 1.0))
    return dict(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, list[float]] = defaultdict(list)
    alarms, flips = 0, 0
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            result, breaches = judge(seed, Path(folder))
        alarms += bool(breaches)
        flips += sum(check.num_tie_flips for check in result.checks)
        for line in breaches:
            print(f"seed {seed}: {line}")
        for tier, ratio in find_ratios(result).items():
            found[tier].append(ratio)
    print(f"{alarms} of {arguments.seeds} correct exports raised an alarm; {flips} near-tie flips")
    print("\n| error over float32's noise | median | largest |\n|---|--:|--:|")
    for tier, ratios in found.items():
        print(f"| {tier} | {statistics.median(ratios):.2f} | {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
