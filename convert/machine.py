"""The machine, versions and memory that figures depend on."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "optimum",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
)


@dataclass(frozen=True)
class Machine:
    """The machine that measured a run's figures."""

    processor: str
    cores: int | None
    system: str
    memory_bytes: int


def describe_machine() -> Machine:
    """This machine."""
    return Machine(_processor(), os.cpu_count(), platform.platform(), psutil.virtual_memory().total)


def versions() -> dict[str, str]:
    """Versions of the interpreter and the packages that affect figures."""
    found = {"python": platform.python_version(), "dense2moe": version("dense2moe")}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes() -> int:
    """This process's resident memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """This process's peak resident memory.

    getrusage(2) counts in kibibytes, but in bytes on macOS, and lags a little behind what is resident now.
    """
    return max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), resident_bytes()
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
