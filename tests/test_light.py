"""Settings and records of exporting are light: commands that only read them start at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "onnx", "onnx_ir", "onnxruntime", "scipy")


@pytest.mark.parametrize(
    "modules",
    [
        ("variant", "names", "quantization.config", "graph.config", "parity.config"),
        ("facts", "quantization.facts", "parity.records", "parity.place"),
    ],
    ids=["settings", "records"],
)
def test_nothing_heavy_is_imported(modules: tuple[str, ...]) -> None:
    code = (
        f"import sys\n{''.join(f'import dense2moe.export.{module}; ' for module in modules)}\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
