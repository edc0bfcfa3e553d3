"""What tests let a stage's process do; the process finds this module by the path that pytest's settings name."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_post_hook

from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.processes import fill, join_processes, leave_processes, on_main, tell, whole

KILLED = 9
"""The exit code of a process that `train` ended where it was told to."""


def double(number: int, progress: Progress) -> int:
    progress("doubling", number, 2 * number)
    return 2 * number


def take(num_bytes: int, progress: Progress) -> int:
    bytearray(b"\1") * num_bytes
    return os.getpid()


class UnpicklableError(Exception):
    """One that cannot be made of its own arguments."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def fail(kind: str, progress: Progress) -> None:
    if kind == "caused":
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        except OSError as error:
            raise RuntimeError("cannot be written") from error
    if kind == "unpicklable":
        raise UnpicklableError("here", "this")
    os.kill(os.getpid(), signal.SIGKILL)


def share() -> None:
    """Share words and the parts of a tensor with the other process of a group."""
    state = join_processes()
    assert state.num_processes == 2
    assert on_main(lambda: state.process_index) == 0
    assert tell("word" if state.is_main_process else None) == "word"
    torch.manual_seed(0)
    layer, other = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)
    before, values = layer.weight.detach().clone(), other.weight.detach().clone()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    assert layer.weight.to_local().shape[0] == (4, 3)[state.process_index]  # type: ignore[operator]
    assert torch.equal(whole(layer.weight), before)
    fill(layer.weight, values)
    assert torch.equal(whole(layer.weight), values)
    print(f"process {state.process_index} is done", flush=True)  # noqa: T201 (its test reads it)
    leave_processes()


def train(
    dense: Path, mixture: Path, data: Path, output: Path, scratch: Path, settings: str, killed_at: int | None = None
) -> None:
    """Fine-tune as one process of a group.

    `scratch` is told what of the model and of the optimizer's state this process has, and that it is done.
    """

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [
            parameters,
            [p.grad for p in parameters],
            *([optimizer.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")),
        ]
        counts = [sum(getattr(t, "_local_tensor", t).numel() for t in tensors) for tensors in kept]
        (scratch / f"counts-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(counts), encoding="utf-8")

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("training fine-tuned") and done == killed_at:
            os._exit(KILLED)

    register_optimizer_step_post_hook(measure)
    finetune(dense, mixture, data, output, FinetuneConfig.model_validate_json(settings), 0, progress, scratch)
    (scratch / f"rank-{os.environ.get('RANK', 0)}-of-{os.environ.get('WORLD_SIZE', 1)}").touch()
    leave_processes()
    threads = [file.read_text(encoding="utf-8").strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert "FSDP_VERSION" in os.environ or not any("gloo" in name for name in threads), threads
