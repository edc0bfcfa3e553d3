"""The bench: speed and memory of one package.

Prefill and decode by batch and length, with their spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from dense2moe.convert.machine import Machine, describe_machine, peak_resident_bytes, resident_bytes, versions
from dense2moe.convert.report.columns import Column, fit_table
from dense2moe.convert.report.numerals import NONE, format_rounded, format_size
from dense2moe.export.opening import open_package
from dense2moe.export.runtime.decoder import PROVIDERS, Decoder
from dense2moe.export.runtime.pass_speed import PassLoad, PassTime, time_passes
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.runtime.speed import Load, LoadTime, time_loads
from dense2moe.export.storage import LOWERING_KEY, MODEL_NAME, find_graph
from dense2moe.export.variant import Device
from dense2moe.upcycle.progress import Progress


@dataclass(frozen=True)
class Spread:
    """Tokens per second: median, slowest and fastest round.

    All rows of a batch count together.
    """

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Bench:
    """The measurements, and what they were made on.

    Memory is this process's, with the interpreter and its libraries. `idle_bytes` were resident before the package was
    loaded, `loaded_bytes` after, `peak_bytes` at the worst moment of all.
    """

    package: str
    device: Device
    lowering: str | None
    package_bytes: int
    num_threads: int
    num_rounds: int
    load_seconds: float
    idle_bytes: int
    loaded_bytes: int
    peak_bytes: int
    loads: tuple[dict[str, Any], ...]
    machine: Machine
    versions: dict[str, str]
    created: str


def bench_package(
    package: Path, loads: Sequence[Load], device: Device, num_threads: int, num_rounds: int, progress: Progress
) -> Bench:
    """Load the package and time the loads.

    Of one without a cache, which decodes nothing, passes of rows as long as the prompts.
    0 threads are as many as onnxruntime takes by itself.

    Raises:
        ExportError: no package, no such device, or a load beyond the context.
    """
    idle = resident_bytes()
    started = time.perf_counter()
    runtime = (Decoder if open_package(package).has_cache else SinglePass)(
        package, PROVIDERS[device], num_threads=num_threads
    )
    seconds, loaded = time.perf_counter() - started, resident_bytes()
    if isinstance(runtime, Decoder):
        described = [_describe(found) for found in time_loads(runtime, loads, num_rounds, progress)]
    else:
        passes = time_passes(runtime, _as_passes(runtime, loads), num_rounds, progress)
        described = [_describe_pass(found) for found in passes]
    return Bench(
        package=package.resolve().name,
        device=device,
        lowering=runtime.metadata.get(LOWERING_KEY),
        package_bytes=sum(
            path.stat().st_size for path in find_graph(package).parent.iterdir() if path.name.startswith(MODEL_NAME)
        ),
        num_threads=num_threads,
        num_rounds=num_rounds,
        load_seconds=seconds,
        idle_bytes=idle,
        loaded_bytes=loaded,
        peak_bytes=max(peak_resident_bytes(), loaded, idle),
        loads=tuple(described),
        machine=describe_machine(),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _as_passes(runtime: SinglePass, loads: Sequence[Load]) -> list[PassLoad]:
    """Rows as long as the prompts, or of one size."""
    is_open = runtime.is_open
    return list(dict.fromkeys(PassLoad(load.batch_size, load.prompt_tokens if is_open else None) for load in loads))


def bench_table(bench: Bench, width: int) -> Table:
    """A row for each load.

    The medians, and in brackets the slowest and the fastest round.
    """
    if any("rows_per_second" in load for load in bench.loads):
        return _pass_table(bench, width)
    columns = [
        Column(heading, folds="tokens/s" in heading, justify="right")
        for heading in ("Batch", "Prompt", "New", "Prefill tokens/s", "Decode tokens/s", "ms a step", "KV cache")
    ]
    rows = []
    for load in bench.loads:
        decode = load["decode_tokens_per_second"]
        rows.append(
            (
                f"{load['batch_size']}",
                f"{load['prompt_tokens']:,}",
                f"{load['new_tokens']:,}",
                _cell(load["prefill_tokens_per_second"]),
                _cell(decode),
                NONE if decode is None else f"{1000 * load['batch_size'] / decode['median']:.2f}",
                format_size(load["cache_bytes"]),
            )
        )
    return fit_table(columns, rows, width)


def _pass_table(bench: Bench, width: int) -> Table:
    """A row for each load of a package of one pass."""
    columns = [
        Column(heading, folds="/s" in heading, justify="right")
        for heading in ("Batch", "Length", "Rows/s", "Tokens/s", "ms a pass")
    ]
    rows = [
        (
            f"{load['batch_size']}",
            NONE if load["length"] is None else f"{load['length']:,}",
            _cell(load["rows_per_second"]),
            _cell(load["tokens_per_second"]),
            f"{1000 * load['batch_size'] / load['rows_per_second']['median']:.2f}",
        )
        for load in bench.loads
    ]
    return fit_table(columns, rows, width)


def bench_lines(bench: Bench) -> list[str]:
    """What the table was measured on, in sentences."""
    machine = bench.machine
    runtime = next(
        f"{name} {bench.versions[name]}" for name in ("onnxruntime", "onnxruntime-gpu") if name in bench.versions
    )
    threads = (
        "its own choice of threads"
        if bench.num_threads == 0
        else f"{bench.num_threads} thread{'s' if bench.num_threads > 1 else ''}"
    )
    experts = f", experts written as {bench.lowering}" if bench.lowering not in (None, "none") else ""
    return [
        f"{bench.package}: {format_size(bench.package_bytes)}{experts}; {runtime} on {bench.device}, {threads}; "
        f"medians of {bench.num_rounds} rounds after one to warm up, the slowest and the fastest round in brackets.",
        f"Memory: {format_size(bench.idle_bytes)} before loading, {format_size(bench.loaded_bytes)} after, "
        f"{format_size(bench.peak_bytes)} "
        f"at the peak; loaded in {bench.load_seconds:.2f} s.",
        f"Machine: {machine.processor}, {machine.cores} cores, {format_size(machine.memory_bytes)}, {machine.system}.",
    ]


def _describe(found: LoadTime) -> dict[str, Any]:
    load = found.load
    prefill = _spread(load.batch_size * load.prompt_tokens, found.prefill_seconds)
    decode = _spread(load.batch_size * load.new_tokens, found.decode_seconds) if load.new_tokens else None
    return {
        **asdict(load),
        "prefill_tokens_per_second": asdict(prefill),
        "decode_tokens_per_second": asdict(decode) if decode else None,
        "prefill_seconds": list(found.prefill_seconds),
        "decode_seconds": list(found.decode_seconds),
        "cache_bytes": found.cache_bytes,
    }


def _describe_pass(found: PassTime) -> dict[str, Any]:
    load = found.load
    tokens = None if load.length is None else _spread(load.batch_size * load.length, found.seconds)
    return {
        **asdict(load),
        "rows_per_second": asdict(_spread(load.batch_size, found.seconds)),
        "tokens_per_second": None if tokens is None else asdict(tokens),
        "seconds": list(found.seconds),
    }


def _spread(num_tokens: int, seconds: Sequence[float]) -> Spread:
    return Spread(num_tokens / statistics.median(seconds), num_tokens / max(seconds), num_tokens / min(seconds))


def _cell(spread: dict[str, float] | None) -> str:
    if spread is None:
        return NONE
    return (
        f"{format_rounded(spread['median'])} ({format_rounded(spread['slowest'])}–{format_rounded(spread['fastest'])})"
    )
