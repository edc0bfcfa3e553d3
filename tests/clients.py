"""Clients of packages in an environment of their own: optimum, sentence-transformers."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

PYTHON = "DENSE2MOE_OPTIMUM_PYTHON"
RECIPE = (
    "python3.11 -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 onnxruntime torch==2.13.0 "
    "sentence-transformers==5.7.0 pillow"
)


def run_client(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """What a user's script does there; skips the test without such an environment."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"{PYTHON} is not set; make an environment by `{RECIPE}` and set it to that one's python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def ask_client(script: str, *arguments: Any) -> Any:
    """The JSON that a script's last line has."""
    finished = run_client(script, *arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])
