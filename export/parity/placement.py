"""The provider that ran each node, by onnxruntime's profile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort

from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.single_pass import SinglePass, Tensors

Placement = dict[str, dict[str, int]]
"""Nodes by execution provider and type of operator."""


def find_placement(directory: Path, provider: str) -> Placement:
    """Count the nodes that each provider ran.

    For a prompt of two tokens, with the profiler on. A provider that lacks a kernel leaves the node to the CPU, without
    a word; so it does with nodes that only compute shapes, and there it is right.
    """
    with TemporaryDirectory() as folder:
        decoder = Decoder(directory, provider, profile=Path(folder) / "profile")
        decoder.run(decoder.new_cache(1, 2), np.zeros((1, 2), np.int64))
        return _count_nodes(decoder.session)


def find_pass_placement(directory: Path, provider: str, given: Tensors) -> Placement:
    """Count each provider's nodes, of a package without a cache."""
    with TemporaryDirectory() as folder:
        package = SinglePass(directory, provider, profile=Path(folder) / "profile")
        package.run(given)
        return _count_nodes(package.session)


def _count_nodes(session: ort.InferenceSession) -> Placement:
    """Read the profile of a session that has run."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }
    counts = Counter((args["provider"], args["op_name"]) for args in nodes.values())
    found: Placement = {}
    for (where, op), count in sorted(counts.items()):
        found.setdefault(where, {})[op] = count
    return found


def count_elsewhere(placement: Placement, provider: str) -> int:
    """Number of nodes that ran on another provider than requested."""
    return sum(sum(ops.values()) for where, ops in placement.items() if where != provider)
