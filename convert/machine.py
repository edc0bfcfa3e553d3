"""The machine, the versions and the memory that figures are told with."""

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
    """What a run's figures were measured on."""

    processor: str
    cores: int | None
    system: str
    memory_bytes: int


def describe_machine() -> Machine:
    """This machine."""
    return Machine(_processor(), os.cpu_count(), platform.platform(), psutil.virtual_memory().total)


def versions() -> dict[str, str]:
    """Versions of the interpreter and of every package that bears on the figures."""
    found = {"python": platform.python_version(), "dense2moe": version("dense2moe")}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory of this process that ever was resident.

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
