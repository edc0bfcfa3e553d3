"""What a race came to: its machine, its speeds, its exports, its targets."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from racing import (
    DENSE,
    ENGINES,
    EXPORTER,
    GB,
    GENAI,
    GENAI_SWITCHED,
    LLAMA,
    MOST_AGAINST_DENSE,
    MOST_EXPORT_BYTES,
    NUM_PROMPT,
    NUM_TOKENS,
    OPENVINO,
    OURS,
    PRECISIONS,
    SWITCHED,
    TORCH,
    Result,
)
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from inference import Outcome


def print_machine(outcome: Outcome, threads: int) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    cache = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("cache size")), "of an unknown size"
    )
    memory = psutil.virtual_memory().total / GB
    found = [
        version for results in outcome.results.values() for result in results.values() for version in result.versions
    ]
    versions = [f"dense2moe {importlib.metadata.version('dense2moe')}", *dict.fromkeys(found)]
    print(
        f"\n{datetime.date.today()}, {processor}, {os.cpu_count()} cores, last cache {cache}, {memory:.0f} GB "
        f"memory, {threads} threads an engine,"
    )
    print(f"Python {platform.python_version()}, {', '.join(versions)}")


def print_speeds(outcome: Outcome, console: Console) -> None:
    model = outcome.model
    title = (
        f"{model.name}: {model.num_weights / 1e6:,.0f} M weights; tokens per second, prompt {NUM_PROMPT}, "
        f"{NUM_TOKENS} tokens, batch 1"
    )
    table = Table(title=title)
    for heading in (
        "precision",
        "engine",
        "prefill",
        "decode",
        "dense2moe / it: prefill",
        "decode",
        "share of limit",
        "",
    ):
        table.add_column(heading, justify="left" if heading in ("precision", "engine", "") else "right")
    for precision, results in outcome.results.items():
        ours = results[OURS].speeds
        for name in ENGINES:
            result = results[name]
            if result.left_out:
                table.add_row(precision, name, "—", "—", "", "", "", result.left_out)
                continue
            speeds = result.speeds
            ratios = ["", ""] if name == OURS else [f"{a / b:.2f}×" for a, b in zip(ours, speeds, strict=True)]
            share = f"{speeds[1] / outcome.limit(precision):.0%}"
            table.add_row(precision, name, *(f"{speed:,.0f}" for speed in speeds), *ratios, share, result.note)
        table.add_section()
    console.print(table)
    print(
        f"Bandwidth {outcome.bandwidth / GB:.1f} GB/s ({outcome.way}); active weights and the limit of decoding:",
        end=" ",
    )
    parts = [f"{p} {outcome.model.active_bytes(p) / 1e6:.1f} MB, {outcome.limit(p):,.0f} tokens/s" for p in PRECISIONS]
    print("; ".join(parts))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in outcome.errors.items())
    print(
        "Largest difference from dense2moe's logits in float32, relative to the largest logit: "
        f"{errors or 'nobody to compare with'}"
    )


def print_exports(outcome: Outcome, console: Console) -> None:
    table = Table(title=f"{outcome.model.name}: write_package, each in a process of its own")
    for heading in ("precision", "lowering asked for", "written", "package MB", "seconds", "peak resident MB"):
        table.add_column(
            heading, justify="right" if heading in ("package MB", "seconds", "peak resident MB") else "left"
        )
    for precision, exports in outcome.exports.items():
        for export in exports:
            sizes = [f"{size / 1e6:,.0f}" for size in (export.num_bytes, export.peak_bytes)]
            table.add_row(precision, export.wish, export.lowering, sizes[0], f"{export.seconds:.1f}", sizes[1])
    console.print(table)


def judge(what: str, value: float, bound: float, at_least: bool, unit: str = "×") -> None:
    met = value >= bound if at_least else value <= bound
    print(
        f"- {what}: {value:,.2f}{unit}, {'at least' if at_least else 'at most'} {bound:,.2f}{unit}: "
        f"{'met' if met else 'MISSED'}"
    )


def _judge_decoding(what: str, found: dict[str, Result], speed: float, genai: str) -> None:
    """Against llama.cpp, the fastest of the others, of which `genai` runs the same file, and the dense model."""
    if LLAMA in found:
        judge(f"{what}, decode against llama.cpp", speed / found[LLAMA].speeds[1], 1.0, True)
    rivals = [name for name in (genai, EXPORTER, OPENVINO, TORCH) if name in found]
    if rivals:
        best = max(rivals, key=lambda name: found[name].speeds[1])
        judge(f"{what}, decode against the fastest other rival ({best})", speed / found[best].speeds[1], 1.0, True)
    judge(
        f"{what}, time of decoding against the dense model", found[DENSE].speeds[1] / speed, MOST_AGAINST_DENSE, False
    )


def print_targets(outcome: Outcome) -> None:
    print(f"\nTargets, {outcome.model.name}:")
    results = {
        precision: {name: r for name, r in found.items() if not r.left_out}
        for precision, found in outcome.results.items()
    }
    for precision, found in results.items():
        for name, genai in ((OURS, GENAI), (SWITCHED, GENAI_SWITCHED)):
            if name in found:
                _judge_decoding(f"{precision}, {name}", found, found[name].speeds[1], genai)
    found = results["float32"]
    rivals = [name for name in found if name not in (OURS, DENSE)]
    if rivals:
        best = max(rivals, key=lambda name: found[name].speeds[0])
        judge(
            f"float32, prefill against the fastest rival ({best})",
            found[OURS].speeds[0] / found[best].speeds[0],
            1.0,
            True,
        )
    for precision in PRECISIONS[1:]:
        for name in (OURS, SWITCHED):
            judge(
                f"{precision}, {name}, prefill against float32",
                results[precision][name].speeds[0] / found[OURS].speeds[0],
                1.0,
                True,
            )
    if outcome.model.name == "1b":
        for precision, exports in outcome.exports.items():
            for export in exports:
                what = f"{precision}, peak resident of the export, lowering {export.wish}"
                judge(what, export.peak_bytes / GB, MOST_EXPORT_BYTES / GB, False, " GB")
