"""Families and targets that are refused by name, and why."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "bitnet": "a norm within its FFN",
    "funnel": "layers in blocks of their own",
    "gemma3n_text": "an activation that leaves each token its largest values alone",
    "ibert": "an FFN that computes with integers",
    "mobilebert": "several FFNs in a layer, behind norms that do not normalize",
    "squeezebert": "FFNs of grouped convolutions",
    "xlnet": "one dropout in two places of its FFN",
}
"""Dense families that users ask for, by their model_type, and what of them not even a mixture of ours can hold."""

NO_TARGET: Mapping[str, str] = {
    "dbrx": "its logits equal OLMo's in float32 alone, and differ by 2e-2 in bfloat16 and 2e-3 in float16, as it "
    "rounds the cosines of rotary embeddings; and without clip_qkv it fails",
    "nllb-moe": "whatever its routers say, it sends every token to experts 0 and 1",
}
"""Sparse architectures that a dense family could become, and why none does; measured with transformers 5.23."""

PARTS: tuple[str, ...] = ("vision_config", "audio_config", "text_config")
"""Config fields of a model that is made of several."""
