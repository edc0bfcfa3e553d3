"""OPT and its kin: two linear maps in the layer itself."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.host import Host, HostStack

_OPT_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="decoder.layers.{layer}",
    ffn="fc1",
    passed=("activation_fn", "fc2"),
    up="fc1",
    down="fc2",
    norm="final_layer_norm",
    activation="activation_function",
)
_DROPPING = replace(
    _OPT_LAYER, layer="layers.{layer}", inner_dropout="activation_dropout", rates=("activation_dropout",)
)

HOSTS: tuple[Host, ...] = (
    Host("biogpt", "BioGptModel", "biogpt", (replace(_DROPPING, activation="hidden_act"),)),
    Host(
        model_type="opt",
        base="OPTModel",
        prefix="model",
        stacks=(
            replace(_OPT_LAYER, when=("do_layer_norm_before", True)),
            replace(_OPT_LAYER, when=("do_layer_norm_before", False), norm="self_attn_layer_norm"),
        ),
    ),
    Host("xglm", "XGLMModel", "model", (replace(_DROPPING, num_layers="num_layers"),)),
)
