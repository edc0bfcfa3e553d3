"""CLIP and SigLIP: two towers, texts and images, or each alone."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.host import READ_FROM, Host, HostHead, HostStack

_TOWER = HostStack(
    num_layers="num_hidden_layers",
    layer="encoder.layers.{layer}",
    ffn="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="layer_norm2",
)
_TEXT, _IMAGES = (
    replace(
        _TOWER,
        num_layers=f"{tower}_config.num_hidden_layers",
        layer=f"{tower}_model.{_TOWER.layer}",
        activation=f"{tower}_config.hidden_act",
    )
    for tower in ("text", "vision")
)
_POSITIONS = ("*embeddings.position_ids",)

CLIP = Host(
    model_type="clip",
    base="CLIPModel",
    prefix="",
    stacks=(_TEXT, _IMAGES),
    heads={"CLIPForImageClassification": HostHead("image-classification", stacks=(_IMAGES,))},
    dropped=_POSITIONS,
)
CLIP_TEXT = Host(
    model_type="clip_text_model",
    base="CLIPTextModel",
    prefix="",
    stacks=(_TOWER,),
    heads={"CLIPTextModelWithProjection": HostHead("feature-extraction", prefix="text_model")},
    dropped=_POSITIONS,
    oldest_transformers=READ_FROM,
)
CLIP_VISION = Host(
    model_type="clip_vision_model",
    base="CLIPVisionModel",
    prefix="",
    stacks=(_TOWER,),
    heads={"CLIPVisionModelWithProjection": HostHead("feature-extraction", prefix="vision_model")},
    dropped=_POSITIONS,
    oldest_transformers=READ_FROM,
)
SIGLIP = Host(
    model_type="siglip",
    base="SiglipModel",
    prefix="",
    stacks=(_TEXT, _IMAGES),
    heads={"SiglipForImageClassification": HostHead("image-classification", stacks=(_IMAGES,))},
    dropped=_POSITIONS,
)
SIGLIP_TEXT = Host(
    model_type="siglip_text_model",
    base="SiglipTextModel",
    prefix="",
    stacks=(_TOWER,),
    dropped=_POSITIONS,
    oldest_transformers=READ_FROM,
)
SIGLIP_VISION = Host(
    model_type="siglip_vision_model",
    base="SiglipVisionModel",
    prefix="",
    stacks=(_TOWER,),
    dropped=_POSITIONS,
    oldest_transformers=READ_FROM,
)

HOSTS = (
    CLIP,
    CLIP_TEXT,
    CLIP_VISION,
    SIGLIP,
    SIGLIP_TEXT,
    SIGLIP_VISION,
)
