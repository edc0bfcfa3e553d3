"""Phi and its kin: ungated FFNs in layers like Llama's."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.host import READ_FROM, Host, HostStack
from dense2moe.upcycle.models.hosts.llama import with_answers

_PHI_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="layers.{layer}",
    ffn="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="input_layernorm",
)
_ARCEE_LAYER = replace(_PHI_LAYER, up="mlp.up_proj", down="mlp.down_proj", norm="post_attention_layernorm")

HOSTS: tuple[Host, ...] = (
    Host("apertus", "ApertusModel", "model", (replace(_ARCEE_LAYER, norm="feedforward_layernorm"),)),
    with_answers(Host("arcee", "ArceeModel", "model", (_ARCEE_LAYER,))),
    Host("jais2", "Jais2Model", "model", (_ARCEE_LAYER,), oldest_transformers=READ_FROM),
    Host(
        model_type="jina_embeddings_v3",
        base="JinaEmbeddingsV3Model",
        prefix="roberta",
        stacks=(replace(_PHI_LAYER, norm="post_attention_layernorm"),),
        oldest_transformers=READ_FROM,
    ),
    Host(
        model_type="mpt",
        base="MptModel",
        prefix="transformer",
        stacks=(
            HostStack(
                num_layers="n_layers",
                layer="blocks.{layer}",
                ffn="ffn.up_proj",  # the module around it adds the residual stream
                passed=("ffn.act", "ffn.down_proj"),
                up="ffn.up_proj",
                down="ffn.down_proj",
                norm="norm_2",
                activation_name="gelu",
            ),
        ),
    ),
    Host("nanochat", "NanoChatModel", "model", (replace(_PHI_LAYER, norm=None),), oldest_transformers=READ_FROM),
    with_answers(Host("nemotron", "NemotronModel", "model", (replace(_ARCEE_LAYER, norm_adds_one=True),))),
    Host("phi", "PhiModel", "model", (_PHI_LAYER,), dropped=("*rotary_emb.inv_freq",)),
    Host(
        model_type="starcoder2",
        base="Starcoder2Model",
        prefix="model",
        stacks=(
            replace(
                _PHI_LAYER,
                up="mlp.c_fc",
                down="mlp.c_proj",
                norm="post_attention_layernorm",
                dropout="residual_dropout",
            ),
        ),
    ),
)
