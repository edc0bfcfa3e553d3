"""DistilBERT: an FFN of two maps with its own dropout."""

from __future__ import annotations

from dense2moe.upcycle.models.host import Host, HostStack

HOSTS: tuple[Host, ...] = (
    Host(
        model_type="distilbert",
        base="DistilBertModel",
        prefix="distilbert",
        stacks=(
            HostStack(
                num_layers="n_layers",
                layer="transformer.layer.{layer}",
                ffn="ffn",
                up="ffn.lin1",
                down="ffn.lin2",
                norm="sa_layer_norm",
                activation="activation",
                dropout="dropout",
            ),
        ),
    ),
)
