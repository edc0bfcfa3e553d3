"""Records of the tables of families for tests, and values that rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sparse:
    """A target. `model` are config values of a small one, beside those of any small decoder.

    shared: it can have an expert that every token visits. partial: it can have experts in every second layer. last: in
    the last layers. cut: its experts can be parts of an FFN. biased: its gates have a selection bias. built: graphs are
    built of it, not traced. settings: of upcycling, without which it is refused.
    """

    model: Mapping[str, Any]
    shared: bool = False
    partial: bool = False
    last: bool = False
    cut: bool = True
    biased: bool = False
    built: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Becomes:
    """A target of a family: what its config must say of the talkative source beside what it carries over.

    says: what the talkative source says otherwise, because this target could not hold it, or holds more than others.
    needs: what every source of the family must say for this target.
    """

    derived: Mapping[str, Any]
    says: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A dense model whose function its mixture must keep, and config values of the mixture that would break it.

    dense: what of its config could be lost. settings: of upcycling; they lead to `target`.
    exact: a zero router must give the very bits of the dense model.
    architecture: the one of the family, filled in.
    """

    target: str
    sprung: tuple[Mapping[str, Any], ...]
    dense: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    architecture: str = ""


@dataclass(frozen=True)
class Exported:
    """A dense model that is exported: its config, how it is upcycled (None: not at all), the target that this makes.

    architecture: the one of the family, filled in.
    """

    overrides: dict[str, Any]
    upcycle: dict[str, Any] | None
    target: str
    architecture: str = ""


@dataclass(frozen=True)
class Family:
    """A dense architecture. `talkative` are values of its config that are no default of it nor of a target."""

    architecture: str
    talkative: Mapping[str, Any]
    targets: Mapping[str, Becomes]
    kept: Mapping[str, Kept]
    exported: Mapping[str, Exported] = field(default_factory=dict)


WINDOW = 12  # shorter than the text of every test
LONG = 1000  # longer
NUM_LAYERS = 4
UNTIED = {"tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
BOTH_WAYS = {"is_causal": False}
BOTH_WAYS_LOST = {"is_causal": True}
NOT_RENORMALIZED = {"norm_topk_prob": False}
NO_WINDOW_IN_ANY_LAYER = {"layer_types": ["full_attention"] * NUM_LAYERS}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

DECODER = {
    "hidden_act": "relu",
    "rms_norm_eps": 1e-3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 99,
    "attention_dropout": 0.25,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 3,
    "eos_token_id": [1, 3],
    "use_cache": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}
NO_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "head_dim": 16,
}
# 0 is Qwen2-MoE's None
FULL = {
    "layer_types": ["full_attention"] * 3,
    "use_sliding_window": False,
    "sliding_window": 0,
    "qkv_bias": False,
}
WINDOWED = {
    "layer_types": ["sliding_attention"] * 3,
    "use_sliding_window": True,
    "sliding_window": 17,
    "qkv_bias": False,
}
PHI3_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 1.0},
    "head_dim": 8,
}
GLM4 = {
    "attention_bias": False,
    "use_qk_norm": False,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "intermediate_size": 48,
}
