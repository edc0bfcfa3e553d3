"""Time and memory of parity beside those of an earlier commit, on one mixture, in one run.

    git worktree add BEFORE b2e4f52
    python benchmarks/parity_cost.py MIXTURE TEXT --before BEFORE [--variants int8 int4] [--rounds 3] [--tokens 16384]

MIXTURE is a checkpoint of a mixture with its tokenizer, TEXT a file in UTF-8, BEFORE a checkout of a commit whose
packages were still called `export` and `upcycle`. Each code quantizes the mixture by rounding, writes its own package,
and judges it in a fresh process; rounds alternate. Printed are medians of what `check_parity` alone takes, without
imports, and ratios to the earlier code. The earlier parity judged quantized packages on one prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 256

_MAKE_BEFORE = """
from {export}.config import OnnxConfig, QuantizeConfig
from {export}.package import write_package
from {export}.quantizer import quantize_checkpoint
quantize_checkpoint(mixture, twin, variant, QuantizeConfig(method="round"), quiet)
write_package(twin, package, OnnxConfig(), quiet)
""".format(export="export")  # its name then
_JUDGE_BEFORE = """
from {export}.config import ParityConfig
from {export}.parity import check_parity
def judge():
    return check_parity(package, twin, mixture, blocks, variant, True, ParityConfig(), quiet)
""".format(export="export")
_MAKE_NOW = """
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
quantize_checkpoint(mixture, twin, variant, QuantizeConfig(method="round"), quiet)
write_package(twin, package, OnnxConfig(), quiet)
"""
_JUDGE_NOW = """
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
def judge():
    return check_parity(ParitySubject(package, twin, mixture, blocks, variant, True), ParityConfig(), quiet)
"""
_HEAD = """
import json, resource, sys, time
from pathlib import Path
mixture, folder, ids, variant = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
twin, package = folder / "twin", folder / "package"
def quiet(what, done, total): pass
"""
_TIMED = """
import torch
from safetensors.torch import load_file
blocks = load_file(ids)["input_ids"]
began = time.perf_counter()
parity = judge()
found = {"seconds": time.perf_counter() - began, "passed": parity.passed, "breaches": list(parity.breaches)}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({**found, "peak_bytes": peak}))
"""


@dataclass(frozen=True)
class Code:
    """One state of the code: its name, where it lies, and how it makes and judges a package."""

    name: str
    checkout: Path
    make: str
    judge: str

    def run(self, program: str, *arguments: object) -> str:
        """What a program prints that runs with this code alone."""
        command = [sys.executable, "-c", _HEAD + program, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(self.checkout)}
        finished = subprocess.run(
            command, cwd=self.checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return finished.stdout


def write_blocks(mixture: Path, text: Path, num_tokens: int, path: Path) -> None:
    """The first tokens of a text, in blocks."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mixture, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(text.read_text(encoding="utf-8")[: 16 * num_tokens], verbose=False)["input_ids"][:num_tokens]
    whole = len(ids) // BLOCK_SIZE * BLOCK_SIZE
    save_file({"input_ids": torch.tensor(ids[:whole]).reshape(-1, BLOCK_SIZE)}, path)


def main() -> None:
    """Make each package once, judge them in alternating rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384)
    given = parser.parse_args()
    codes = (
        Code("before", given.before.resolve(), _MAKE_BEFORE, _JUDGE_BEFORE),
        Code("now", ROOT, _MAKE_NOW, _JUDGE_NOW),
    )
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "blocks.safetensors"
        write_blocks(given.mixture, given.text, given.tokens, ids)
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {given.rounds} rounds")
        print("| variant | code | seconds | ratio | peak | verdict |\n|---|---|--:|--:|--:|---|")
        for variant in given.variants:
            print_rows(variant, codes, given.mixture.resolve(), ids, Path(scratch), given.rounds)


def print_rows(variant: str, codes: tuple[Code, ...], mixture: Path, ids: Path, scratch: Path, rounds: int) -> None:
    """One variant by every code."""
    folders = {code.name: scratch / f"{variant}-{code.name}" for code in codes}
    for code in codes:
        for part in ("twin", "package"):
            (folders[code.name] / part).mkdir(parents=True)
        code.run(code.make, mixture, folders[code.name], ids, variant)
    found: dict[str, list[dict[str, float]]] = {code.name: [] for code in codes}
    for _ in range(rounds):
        for code in codes:
            said = code.run(code.judge + _TIMED, mixture, folders[code.name], ids, variant)
            found[code.name].append(json.loads(said.splitlines()[-1]))
    medians = {name: statistics.median(each["seconds"] for each in runs) for name, runs in found.items()}
    for name, runs in found.items():
        peak = max(each["peak_bytes"] for each in runs) / 1e9
        verdict = "passed" if runs[-1]["passed"] else f"broken: {len(runs[-1]['breaches'])} lines"
        ratio = medians[name] / medians["before"]
        print(f"| {variant} | {name} | {medians[name]:.1f} | {ratio:.2f} | {peak:.2f} GB | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
