"""DINOv2 and DINOv3: gated FFNs by config, images of any size."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.host import READ_FROM, Host, HostStack

_PLAIN = HostStack(
    num_layers="num_hidden_layers",
    layer="encoder.layer.{layer}",
    ffn="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="norm2",
    when=("use_swiglu_ffn", False),
)
_GATED = replace(
    _PLAIN,
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation_name="silu",
    when=("use_swiglu_ffn", True),
)
_PLAIN_3 = replace(
    _PLAIN, layer="model.layer.{layer}", up="mlp.up_proj", down="mlp.down_proj", when=("use_gated_mlp", False)
)

DINOV2 = Host(
    model_type="dinov2",
    base="Dinov2Model",
    prefix="dinov2",
    stacks=(_PLAIN, _GATED),
    any_image_size=True,
    oldest_transformers=READ_FROM,
)
DINOV2_WITH_REGISTERS = Host(
    model_type="dinov2_with_registers",
    base="Dinov2WithRegistersModel",
    prefix="dinov2_with_registers",
    stacks=(_PLAIN, _GATED),
    any_image_size=True,
    oldest_transformers=READ_FROM,
)
DINOV3_VIT = Host(
    model_type="dinov3_vit",
    base="DINOv3ViTModel",
    prefix="",
    stacks=(_PLAIN_3, replace(_PLAIN_3, gate="mlp.gate_proj", when=("use_gated_mlp", True))),
    any_image_size=True,
    zero_router="rounding",  # GELU of a gate is computed in another way where it lies between other numbers
    oldest_transformers=READ_FROM,
)

HOSTS = (
    DINOV2,
    DINOV2_WITH_REGISTERS,
    DINOV3_VIT,
)
