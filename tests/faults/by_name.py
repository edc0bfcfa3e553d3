"""Faults planted in our own packages, by the names of their weights, all in the last of two layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from dense2moe.export.storage import DATA_NAME, MODEL_NAME

Weights = dict[str, np.ndarray]
FUSED, GROUPED = "layers.1.moe.fc", "layers.1.moe.expert."


def swap_two_experts(weights: Weights) -> None:
    for name in list(weights):
        if name.startswith(FUSED):
            weights[name] = weights[name][[1, 0, 2, 3]]
        if name.startswith(f"{GROUPED}0."):
            other = name.replace(f"{GROUPED}0.", f"{GROUPED}1.")
            weights[name], weights[other] = weights[other], weights[name]


def swap_gate_and_up(weights: Weights) -> None:
    for name in list(weights):
        if name.startswith(f"{FUSED}1"):
            interleaved = weights[name]
            weights[name] = np.stack([interleaved[:, 1::2], interleaved[:, 0::2]], axis=2).reshape(interleaved.shape)
        if name.startswith(GROUPED) and ".gate_up." in name:
            axis = 1 if name.endswith(".weight") else 0
            weights[name] = np.roll(weights[name], weights[name].shape[axis] // 2, axis)


def perturb_the_router(weights: Weights) -> None:
    router = weights["router_logits.1.weight"]
    weights["router_logits.1.weight"] = router + np.float32(0.2 * router.std()) * np.random.default_rng(
        0
    ).standard_normal(router.shape, np.float32)


def scale_one_expert_by_2_percent(weights: Weights) -> None:
    for name in list(weights):
        if name in (f"{FUSED}2.scales", f"{FUSED}2"):
            weights[name] = (weights[name] * np.float32([1, 1, 1.02, 1])[:, None, None]).astype(weights[name].dtype)
        if name == f"{GROUPED}2.down.scales":
            weights[name] = (weights[name] * np.float32(1.02)).astype(weights[name].dtype)


def lose_a_head_to_nan(weights: Weights) -> None:
    name = next(name for name in ("logits.weight", "logits.scales") if name in weights)
    weights[name] = np.full_like(weights[name], np.nan)


Change = Callable[[Weights], None]
CHANGES: tuple[Change, ...] = (swap_two_experts, swap_gate_and_up, perturb_the_router, scale_one_expert_by_2_percent)


def change_weights(right: Path, directory: Path, change: Change | None = None, epsilon: float | None = None) -> Path:
    """A copy of a package with its weights changed; `epsilon` is set in the norm before layer 1's attention."""
    package = directory / "faulty"
    shutil.copytree(right, package)
    proto = onnx.load(package / MODEL_NAME)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    after = dict(before)
    if change is not None:
        change(after)
        assert any(not np.array_equal(before[name], after[name]) for name in before)
    for tensor in proto.graph.initializer:
        assert after[tensor.name].dtype == before[tensor.name].dtype
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(after[tensor.name]), tensor.name))
    for node in proto.graph.node:
        if epsilon is not None and "layers.1.normed" in node.output:
            next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = epsilon
    (package / DATA_NAME).unlink()
    onnx.save(proto, package / MODEL_NAME)
    return package
