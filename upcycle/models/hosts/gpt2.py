"""GPT-2 and its kin: an FFN with its own dropout."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.host import Host, HostHead, HostStack

_GPT2_LAYER = HostStack(
    num_layers="n_layer",
    layer="h.{layer}",
    ffn="mlp",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_2",
    transposed=True,
    activation="activation_function",
    dropout="resid_pdrop",
)
_GPTJ_LAYER = replace(_GPT2_LAYER, up="mlp.fc_in", down="mlp.fc_out", norm="ln_1", transposed=False)
_MASKS = ("*attn.bias", "*attn.masked_bias", "*attn.attention.bias", "*attn.attention.masked_bias", "*attn.causal_mask")
"""Buffers that old checkpoints store."""

HOSTS: tuple[Host, ...] = (
    Host("codegen", "CodeGenModel", "transformer", (_GPTJ_LAYER,), dropped=_MASKS),
    Host(
        model_type="gpt2",
        base="GPT2Model",
        prefix="transformer",
        stacks=(_GPT2_LAYER,),
        dropped=_MASKS,
        zero_router="rounding",  # Conv1D's product of one token is summed in another order
    ),
    Host("gpt_bigcode", "GPTBigCodeModel", "transformer", (replace(_GPT2_LAYER, transposed=False),), dropped=_MASKS),
    Host(
        model_type="gpt_neo",
        base="GPTNeoModel",
        prefix="transformer",
        stacks=(replace(_GPT2_LAYER, num_layers="num_layers", transposed=False, dropout="resid_dropout"),),
        dropped=_MASKS,
    ),
    Host("gptj", "GPTJModel", "transformer", (_GPTJ_LAYER,), dropped=_MASKS),
    Host(
        model_type="openai-gpt",
        base="OpenAIGPTModel",
        prefix="transformer",
        stacks=(replace(_GPT2_LAYER, norm="ln_1", activation="afn"),),
        heads={"OpenAIGPTLMHeadModel": HostHead("text-generation")},
        dropped=_MASKS,
        zero_router="rounding",  # as GPT-2's
    ),
)
