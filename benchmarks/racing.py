"""Races of engines: each in a process of its own, all in turns, round after round."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dense2moe.export.variant import Variant

OURS, SWITCHED, DENSE, LLAMA, GENAI, GENAI_SWITCHED, EXPORTER, OPENVINO, TORCH = (
    "dense2moe",
    "dense2moe, switched",
    "dense2moe, dense model",
    "llama.cpp",
    "onnxruntime-genai",
    "onnxruntime-genai, switched",
    "transformers' exporter",
    "OpenVINO",
    "torch eager",
)
ENGINES = {
    OURS: "dense2moe",
    SWITCHED: "dense2moe",
    DENSE: "dense2moe",
    LLAMA: "llama.cpp",
    GENAI: "onnxruntime-genai",
    GENAI_SWITCHED: "onnxruntime-genai",
    EXPORTER: "transformers-onnx",
    OPENVINO: "openvino",
    TORCH: "torch",
}
NUM_EXPERTS, TOP_K, ROUTER_FACTOR = 8, 2, 20.0
NUM_PROMPT, NUM_TOKENS, NUM_COMPARED = 256, 64, 9
NUM_PROMPT, NUM_TOKENS, NUM_COMPARED = 256, 64, 9
PRECISIONS: tuple[Variant, ...] = ("float32", "int8", "int4")
GGUF_KINDS = {"float32": "f32", "int8": "q8_0", "int4": "q4_0"}
WEIGHT_BITS = {"float32": 32.0, "int8": 8.5, "int4": 4.5}
NAMED_LOWERING = "grouped"
MOST_RELATIVE_ERROR, MOST_AGAINST_DENSE, MOST_EXPORT_BYTES = 1e-3, 1.15, 1.5e9
GB = 1e9


class EngineError(Exception):
    """An engine, or what makes its file, that ended early; its last words."""


def last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "without a word"


def run_child(command: Sequence[object], log: Path) -> tuple[str, int, float]:
    """Run a command to its end; returns what it printed, its peak resident bytes and its seconds."""
    started = time.perf_counter()
    with log.open("w") as errors, tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise EngineError(f"{Path(str(command[1])).name} ended with {process.returncode}: {last_words(log)}")
    return printed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - started


@dataclass(frozen=True)
class Contender:
    """An engine in its Python, and what it runs.

    `engine`: which one of the script it is, where its name does not say it.
    """

    name: str
    python: Path
    path: Path
    engine: str = ""

    @property
    def num_bytes(self) -> int:
        """Of its files."""
        files = [self.path] if self.path.is_file() else self.path.iterdir()
        return sum(file.stat().st_size for file in files)


class Running:
    """The process of a contender, ready to answer; `script` stands beside this one and has the engines."""

    def __init__(self, contender: Contender, threads: int, folder: Path, script: str = "engines.py") -> None:
        self.log = folder / f"{contender.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [
            contender.python,
            Path(__file__).resolve().with_name(script),
            "run",
            contender.engine or ENGINES[contender.name],
            contender.path,
            threads,
        ]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self.hello = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise EngineError(f"ended with {self.process.returncode}: {last_words(self.log)}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # its log says what it died of
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@dataclass
class Result:
    """What is known of one engine in one precision."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    note: str = ""
    versions: list[str] = field(default_factory=list)
    logits: np.ndarray | None = None
    left_out: str = ""

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens per second of prefill and decoding, medians."""
        return NUM_PROMPT / statistics.median(self.prefill), NUM_TOKENS / statistics.median(self.decode)


class Race:
    """Contenders that take turns on the same requests."""

    def __init__(self, vocabulary: int, threads: int, folder: Path) -> None:
        self.vocabulary, self.threads, self.folder = vocabulary, threads, folder
        self.results: dict[str, Result] = {}

    def run(self, contenders: Sequence[Contender], rounds: int) -> None:
        """Rounds after a start that is not counted.

        Of engines that do not fit into memory together, half as many with two requests a turn.
        """
        # Weights are mapped, and once more packed for the processor's kernels.
        together = 2 * sum(contender.num_bytes for contender in contenders) < 0.8 * psutil.virtual_memory().available
        with contextlib.ExitStack() as stack:
            running = {}
            if together:
                for contender in contenders:
                    started = self._start(contender)
                    if started:
                        running[contender.name] = stack.enter_context(contextlib.closing(started))
            num_rounds = rounds if together else (rounds + 1) // 2
            for number in range(num_rounds):
                at = number % len(contenders)
                for contender in [*contenders[at:], *contenders[:at]]:
                    if not self.results.setdefault(contender.name, Result()).left_out:
                        self._turn(contender, running.get(contender.name), number, 1 if together else 2)
                print(f"  round {number + 1} of {num_rounds}", file=sys.stderr)

    def _start(self, contender: Contender) -> Running | None:
        """Load an engine and let it run once; None, and the reason in its result, where it cannot."""
        result = self.results.setdefault(contender.name, Result())
        try:
            running = Running(contender, self.threads, self.folder)
            result.versions, result.note = running.hello["versions"], result.note or running.hello["note"]
            request = self._request(0)
            answer = running.ask(
                {
                    "prompt": request["prompt"],
                    "tokens": request["tokens"][: NUM_COMPARED - 1],
                    "num_logits": NUM_COMPARED,
                }
            )
        except EngineError as error:
            result.left_out = str(error)
            return None
        result.logits = np.array(answer["logits"])
        return running

    def _turn(self, contender: Contender, running: Running | None, number: int, count: int) -> None:
        once = running is None
        running = running or self._start(contender)
        if running is None:
            return
        result = self.results[contender.name]
        time.sleep(0.05)  # until the threads of the engine before have stopped spinning
        try:
            for part in range(count):
                answer = running.ask({**self._request(1 + number * count + part), "num_logits": 0})
                result.prefill.append(answer["prefill"])
                result.decode.append(answer["decode"])
        except EngineError as error:
            result.left_out = str(error)
        if once:
            running.close()

    def _request(self, seed: int) -> dict[str, Any]:
        ids = np.random.default_rng(seed).integers(3, self.vocabulary, NUM_PROMPT + NUM_TOKENS).tolist()
        return {"prompt": ids[:NUM_PROMPT], "tokens": ids[NUM_PROMPT:]}
