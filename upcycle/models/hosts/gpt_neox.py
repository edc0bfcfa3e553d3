"""GPT-NeoX and its kin: `dense_h_to_4h` and `dense_4h_to_h`."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.architecture import Condition
from dense2moe.upcycle.models.host import Host, HostStack

_NEOX_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="layers.{layer}",
    ffn="mlp",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="post_attention_layernorm",
)
_WHOLE = Condition(
    lambda config: not (config.slow_but_exact and config.pretraining_tp > 1),
    lambda config: "slow_but_exact is True; it must be False: it adds products of slices in an order of its own",
)
_MASKS = ("*attention.bias", "*attention.masked_bias", "*rotary_emb.inv_freq")
"""Buffers that old checkpoints store."""

HOSTS: tuple[Host, ...] = (
    Host(
        model_type="bloom",
        base="BloomModel",
        prefix="transformer",
        stacks=(
            replace(
                _NEOX_LAYER,
                num_layers="n_layer",
                layer="h.{layer}",
                ffn="mlp.dense_h_to_4h",  # the module around it adds the residual stream
                passed=("mlp.gelu_impl", "mlp.dense_4h_to_h"),
                activation_name="gelu_fast",
            ),
        ),
        conditions=(_WHOLE,),
    ),
    Host(
        model_type="falcon",
        base="FalconModel",
        prefix="transformer",
        stacks=(
            replace(
                _NEOX_LAYER,
                layer="h.{layer}",
                norm="ln_mlp",
                other_norms=("post_attention_layernorm", "input_layernorm"),
                activation="activation",
            ),
        ),
        dropped=_MASKS,
        zero_router="rounding",  # its linear maps round before they add a bias
    ),
    Host("gpt_neox", "GPTNeoXModel", "gpt_neox", (_NEOX_LAYER,), dropped=_MASKS),
    Host("gpt_neox_japanese", "GPTNeoXJapaneseModel", "gpt_neox_japanese", (_NEOX_LAYER,), dropped=_MASKS),
    Host("persimmon", "PersimmonModel", "model", (_NEOX_LAYER,), dropped=_MASKS),
)
