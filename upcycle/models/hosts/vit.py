"""ViT, and encoders of images or spectrograms that have its layers."""

from __future__ import annotations

from dense2moe.upcycle.models.host import READ_FROM, Host, HostHead, HostStack

VIT_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="layers.{layer}",
    ffn="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="layernorm_after",
)
"""In transformers 4, ViT's FFN lies in two modules, as BERT's."""

VIT = Host(
    model_type="vit",
    base="ViTModel",
    prefix="vit",
    stacks=(VIT_LAYER,),
    dropped=("vit.pooler.*",),
    oldest_transformers=READ_FROM,
)
DEIT = Host(
    model_type="deit",
    base="DeiTModel",
    prefix="deit",
    stacks=(VIT_LAYER,),
    heads={"DeiTForImageClassificationWithTeacher": HostHead("image-classification")},
    dropped=("deit.pooler.*",),
    oldest_transformers=READ_FROM,
)
BEIT = Host(model_type="beit", base="BeitModel", prefix="beit", stacks=(VIT_LAYER,), oldest_transformers=READ_FROM)
VIT_MAE = Host(
    model_type="vit_mae",
    base="ViTMAEModel",
    prefix="vit",
    stacks=(VIT_LAYER,),  # the decoder, which pretraining alone has, stays dense
    heads={"ViTMAEForPreTraining": HostHead("masked-im")},
    oldest_transformers=READ_FROM,
)
VIT_MSN = Host(
    model_type="vit_msn", base="ViTMSNModel", prefix="vit", stacks=(VIT_LAYER,), oldest_transformers=READ_FROM
)
IJEPA = Host(model_type="ijepa", base="IJepaModel", prefix="ijepa", stacks=(VIT_LAYER,), oldest_transformers=READ_FROM)
AST = Host(
    model_type="audio-spectrogram-transformer",
    base="ASTModel",
    prefix="audio_spectrogram_transformer",
    stacks=(VIT_LAYER,),
    oldest_transformers=READ_FROM,
)

HOSTS = (
    VIT,
    DEIT,
    BEIT,
    VIT_MAE,
    VIT_MSN,
    IJEPA,
    AST,
)
