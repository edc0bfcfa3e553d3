"""Inputs and outputs added to a loaded graph, for inspection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from dense2moe.export import names


@dataclass(frozen=True)
class Inspection:
    """Values inside the graph that a decoder shows.

    `streams`: router logits, selection scores and residual streams of every layer. `attention`: what its attentions
    give. `values`: more values, by name. `routers`: names of router logits that a run can add to, for `num_experts`
    experts. Nothing that the graph computes changes.
    """

    streams: bool = False
    attention: bool = False
    values: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    num_experts: int = 0

    def find_taps(self, model: onnx.ModelProto) -> list[str]:
        """The names of streams and attentions in a graph, layer by layer."""
        return (_tap_names(model) if self.streams else []) + (_attention_names(model) if self.attention else [])


NOTHING = Inspection()


def _tap_names(model: onnx.ModelProto) -> list[str]:
    """Router logits, selection scores and residual streams of every layer, in order.

    None in a package of other makers.
    """
    made = {name: names.order_tap(name) for node in model.graph.node for name in node.output}
    return [name for _, name in sorted((order, name) for name, order in made.items() if order is not None)]


def _attention_names(model: onnx.ModelProto) -> list[str]:
    """The named outputs of every layer's attention."""
    made = {name for node in model.graph.node for name in node.output}
    num_layers = names.count_layers(value.name for value in model.graph.input)
    return [name for n in range(num_layers) if (name := names.attention_output(n)) in made]


def let_routers_be_nudged(model: onnx.ModelProto, routers: Sequence[str]) -> None:
    """Add an input `router_nudge` [T or 1, E] to router logits.

    So experts that a text does not visit can be visited: what reads the logits reads the sum, and the logits are as
    they were.
    """
    if not routers:
        return
    nodes = model.graph.node
    for name in routers:
        for node in nodes:
            node.input[:] = [names.nudged(name) if read == name else read for read in node.input]
            for attribute in node.attribute:
                for inner in attribute.g.node if attribute.HasField("g") else ():
                    inner.input[:] = [names.nudged(name) if read == name else read for read in inner.input]
        place = next(number for number, node in enumerate(nodes) if name in node.output)
        nodes.insert(place + 1, onnx.helper.make_node("Add", [name, names.ROUTER_NUDGE], [names.nudged(name)]))
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(names.ROUTER_NUDGE, onnx.TensorProto.FLOAT, ["nudged", "num_experts"])
    )


def let_logits_be_cut(model: onnx.ModelProto) -> bool:
    """Add an input `first_logit` [1]: the head's first token.

    A prompt needs the logits of its last token alone, and those of all may take more time than a layer and more memory
    than the weights. It is no input of the package, since others who load it would have to give it. Returns whether it
    was added; a package of other makers may lack the name.
    """
    nodes = model.graph.node
    readers = [number for number, node in enumerate(nodes) if names.FINAL_NORMED in node.input]
    if not readers:
        return False
    kept = f"{names.FINAL_NORMED}_kept"
    for number in readers:
        nodes[number].input[:] = [kept if name == names.FINAL_NORMED else name for name in nodes[number].input]
    bounds = {f"{names.FIRST_LOGIT}.end": np.iinfo(np.int64).max, f"{names.FIRST_LOGIT}.axis": 1}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([value], np.int64), name) for name, value in bounds.items()
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info(names.FIRST_LOGIT, onnx.TensorProto.INT64, [1]))
    nodes.insert(readers[0], onnx.helper.make_node("Slice", [names.FINAL_NORMED, names.FIRST_LOGIT, *bounds], [kept]))
    return True
