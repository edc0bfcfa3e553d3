"""Facts about mixture-of-experts decoders: names of tensors and of routing, for the graph builder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from export.errors import ExportError
from export.routing import Routing

TensorClass = Literal["experts", "router", "attention", "embedding", "norm"]


@dataclass(frozen=True)
class DecoderFamily:
    """One decoder architecture: Llama's shape (pre-norm, rotary, grouped-query attention) with experts in the FFN's place."""

    model_type: str
    embedding: str
    head: str
    final_norm: str
    attention_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_norm: str
    router: str
    expert_gate: str
    expert_up: str
    expert_down: str
    routing: Callable[[Any], Routing]
    rotary: Callable[[Any], Any]

    def classify(self, name: str) -> TensorClass:
        """The class of a tensor by its name; unknown names are an error, so that nothing is quantized or kept by accident."""
        kinds: tuple[tuple[TensorClass, tuple[str, ...]], ...] = (
            ("experts", (self.expert_gate, self.expert_up, self.expert_down)),
            ("router", (self.router,)),
            ("attention", (self.query, self.key, self.value, self.attention_output)),
            ("embedding", (self.embedding, self.head)),
            ("norm", (self.final_norm, self.attention_norm, self.ffn_norm)),
        )
        parts = name.split(".")
        for kind, patterns in kinds:
            for pattern in patterns:
                pieces = pattern.split(".")
                if len(parts) == len(pieces) and all(a == b or (b.startswith("{") and a.isdigit()) for a, b in zip(parts, pieces, strict=True)):
                    return kind
        raise ExportError(f"tensor '{name}' is not known to the {self.model_type} family; it can be neither quantized nor exported")


_MIXTRAL = DecoderFamily(
    model_type="mixtral",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    final_norm="model.norm.weight",
    attention_norm="model.layers.{layer}.input_layernorm.weight",
    query="model.layers.{layer}.self_attn.q_proj.weight",
    key="model.layers.{layer}.self_attn.k_proj.weight",
    value="model.layers.{layer}.self_attn.v_proj.weight",
    attention_output="model.layers.{layer}.self_attn.o_proj.weight",
    ffn_norm="model.layers.{layer}.post_attention_layernorm.weight",
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert_gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    expert_up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    expert_down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    routing=lambda config: Routing(config.num_local_experts, config.num_experts_per_tok, "softmax", renormalize=True),
    rotary=MixtralRotaryEmbedding,
)

DECODER_FAMILIES: tuple[DecoderFamily, ...] = (_MIXTRAL,)

# Rotary variants whose tables depend on positions alone; the others change with the length of each request.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def find_decoder_family(config: PreTrainedConfig) -> DecoderFamily:
    """The family of a mixture-of-experts config, its values checked.

    Raises:
        ExportError: the architecture, activation, rotary variant or window is not covered.
    """
    family = next((f for f in DECODER_FAMILIES if f.model_type == config.model_type), None)
    if family is None:
        supported = ", ".join(f.model_type for f in DECODER_FAMILIES)
        raise ExportError(f"config.json: model_type {config.model_type} has no ONNX builder yet; supported: {supported}")
    if config.hidden_act != "silu":
        raise ExportError(f"config.json: hidden_act is {config.hidden_act}; the builder covers silu")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise ExportError(f"config.json: rope_type is {rope_type}; the builder covers {', '.join(STATIC_ROPE_TYPES)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ExportError(
            f"config.json: sliding_window is {window} in a context of {config.max_position_embeddings}; the builder covers full attention alone"
        )
    return family
