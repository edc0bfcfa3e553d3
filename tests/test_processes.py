"""What processes share: words, and the parts of one tensor."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import prepare_simple_launcher_cmd_env
from programs import launch
from worker_jobs import share

from dense2moe.upcycle.training.processes import explain_single_process, fill, on_main, tell, whole


def test_one_process_alone_speaks_to_itself() -> None:
    assert tell("word") == "word"
    assert on_main(lambda: 3) == 3


@pytest.mark.parametrize(("options", "is_told"), [("--num_processes 2", True), ("--num_processes 1", False)])
def test_a_launch_of_several_processes_that_began_one_is_told(
    options: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what accelerate gives to the program that it begins."""
    assert explain_single_process() is None  # begun by hand
    asked = f"--cpu {options} --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"
    arguments = launch_command_parser().parse_args([*asked.split(), "x.py"])
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert command == [sys.executable, "x.py"]
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    assert (explain_single_process() is not None) is is_told
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun says of one process
    assert explain_single_process() is None


def test_a_tensor_of_one_process_is_whole_and_is_filled() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    fill(parameter, torch.ones(2, 3))
    assert torch.equal(whole(parameter), torch.ones(2, 3))
    assert not whole(parameter).requires_grad


def test_two_processes_share_words_and_the_parts_of_a_tensor(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert launch(2, share, said=said) == [0, 0], said.read_text(encoding="utf-8")
    assert all(f"process {number} is done" in said.read_text(encoding="utf-8") for number in (0, 1))
