"""ViT: an encoder of image patches."""

from __future__ import annotations

from dense2moe.upcycle.models.host import Host, HostStack

VIT = Host(
    model_type="vit",
    base="ViTModel",
    prefix="vit",
    stacks=(
        HostStack(
            num_layers="num_hidden_layers",
            layer="layers.{layer}",
            ffn="mlp",
            up="mlp.fc1",
            down="mlp.fc2",
            norm="layernorm_after",
        ),
    ),
    oldest_transformers="5.23.0",
)
