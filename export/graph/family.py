"""Facts about decoders: names of tensors, routing, norms and multipliers, for the graph builder."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoRotaryEmbedding
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeRotaryEmbedding
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from dense2moe.export.errors import ExportError
from dense2moe.export.nodes.ffn_gate import Activation
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.models.routing import read_gate

TensorClass = Literal["experts", "router", "attention", "embedding", "head", "norm", "bias"]


@dataclass(frozen=True)
class AttentionNames:
    """Projections of one layer's attention, and those of them that may have a bias, by its matrix's name.

    Norms of query and key are optional.

    `norm_per_head`: the norms of query and key are of each head by itself, and not of the whole row.
    """

    query: str
    key: str
    value: str
    output: str
    query_norm: str | None = None
    key_norm: str | None = None
    biased: tuple[str, ...] = ()
    norm_per_head: bool = True


@dataclass(frozen=True)
class GatedFfn:
    """Matrices of one gated FFN. Without `gate`, `up` holds the rows of the gate and then those of up."""

    gate: str | None
    up: str
    down: str


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token visits; `scale` is a vector whose sigmoid with the token gates its output."""

    ffn: GatedFfn
    scale: str | None = None


@dataclass(frozen=True)
class Multipliers:
    """Factors of the forward pass; `attention` None is one over the root of the head size. Logits are divided."""

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class DecoderFamily:
    """One decoder architecture with rotary grouped-query attention.

    And with experts in the FFN's place where it has a router. A norm that an architecture does not have is None:
    Llama's shape has `attention_norm` and `ffn_norm` before the blocks, OLMo's has `attention_post_norm` and
    `ffn_post_norm` after them. Norms of query and key are there where the checkpoint has them. `experts` have
    `{expert}` in their names, or are stacked in one tensor [E, rows, columns]. A layer without a router has the FFN
    `dense`; a family without one is dense throughout, and has no experts and no routing either. `selection_bias` [E] is
    added to the router's scores for the choice of experts. `refusal` says why the builder does not cover a config of
    the family, or None.
    """

    model_type: str
    attention: AttentionNames
    rotary: Callable[[Any], Any]
    router: str | None = None
    experts: GatedFfn | None = None
    routing: Callable[[Any], Gate] | None = None
    selection_bias: str | None = None
    attention_norm: str | None = "model.layers.{layer}.input_layernorm.weight"
    ffn_norm: str | None = "model.layers.{layer}.post_attention_layernorm.weight"
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    dense: GatedFfn | None = None
    shared: SharedExpert | None = None
    multipliers: Callable[[Any], Multipliers] = lambda _: Multipliers()
    window: Callable[[Any, int], int | None] = lambda _, __: None
    refusal: Callable[[Any], str | None] = lambda _: None
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    kinds: tuple[tuple[TensorClass, tuple[str, ...]], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Which patterns are of which class."""
        a = self.attention
        ffns = (self.experts, self.dense, self.shared.ffn if self.shared else None)
        norms = (
            self.final_norm,
            self.attention_norm,
            self.ffn_norm,
            self.attention_post_norm,
            self.ffn_post_norm,
            a.query_norm,
            a.key_norm,
        )
        matrices = (a.query, a.key, a.value, a.output)
        kinds: tuple[tuple[TensorClass, tuple[str | None, ...]], ...] = (
            ("experts", tuple(name for ffn in ffns if ffn for name in (ffn.gate, ffn.up, ffn.down))),
            ("router", (self.router, self.selection_bias, self.shared.scale if self.shared else None)),
            ("attention", matrices),
            ("bias", tuple(bias_name(name) for name in a.biased)),
            ("embedding", (self.embedding,)),
            ("head", (self.head,)),
            ("norm", norms),
        )
        object.__setattr__(self, "kinds", tuple((kind, tuple(name for name in names if name)) for kind, names in kinds))

    @property
    def stacked(self) -> bool:
        """Whether all experts of a layer lie in one tensor."""
        return self.experts is not None and "{expert}" not in self.experts.up

    def has_experts(self, layer: int, names: Container[str]) -> bool:
        """Whether a layer has a router, in a checkpoint with tensors of these names."""
        return self.router is not None and self.router.format(layer=layer) in names

    def classify(self, name: str) -> TensorClass:
        """The class of a tensor by its name.

        Unknown names are an error, so that nothing is quantized or kept by accident.
        """
        parts = name.split(".")
        for kind, patterns in self.kinds:
            for pattern in patterns:
                pieces = pattern.split(".")
                if len(parts) == len(pieces) and all(
                    a == b or (b.startswith("{") and a.isdigit()) for a, b in zip(parts, pieces, strict=True)
                ):
                    return kind
        raise ExportError(
            f"tensor '{name}' is not known to the {self.model_type} family; it can be neither quantized nor exported"
        )


def layer_of(name: str) -> int:
    """The layer that a tensor is in by its name, -1 outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def bias_name(matrix: str) -> str:
    """The name of a matrix's bias."""
    return matrix.removesuffix(".weight") + ".bias"


_LAYER = "model.layers.{layer}."
_MLP = f"{_LAYER}mlp."
_SPARSE = f"{_LAYER}block_sparse_moe."
_QUERY, _KEY, _VALUE, _OUTPUT = (f"{_LAYER}self_attn.{letter}_proj.weight" for letter in "qkvo")
_PLAIN = AttentionNames(_QUERY, _KEY, _VALUE, _OUTPUT)
_BIASED = replace(_PLAIN, biased=(_QUERY, _KEY, _VALUE, _OUTPUT))
_NORMED = replace(_BIASED, query_norm=f"{_LAYER}self_attn.q_norm.weight", key_norm=f"{_LAYER}self_attn.k_norm.weight")
_QWEN_EXPERTS = GatedFfn(*(f"{_MLP}experts.{{expert}}.{matrix}_proj.weight" for matrix in ("gate", "up", "down")))
_QWEN_DENSE = GatedFfn(*(f"{_MLP}{matrix}_proj.weight" for matrix in ("gate", "up", "down")))


def _glm4_moe_refusal(config: Any) -> str | None:
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        return f"partial_rotary_factor is {rotated:g}; the builder rotates whole heads"
    if config.n_group != 1:
        return f"n_group is {config.n_group}; the builder chooses among all experts at once"
    return None


def _one_window(config: Any, _: int) -> int | None:
    window: int | None = config.sliding_window
    return window


def _window_by_layer(config: Any, layer: int) -> int | None:
    return int(config.sliding_window) if config.layer_types[layer] == "sliding_attention" else None


def _granite_multipliers(config: Any) -> Multipliers:
    return Multipliers(
        config.embedding_multiplier, config.attention_multiplier, config.residual_multiplier, config.logits_scaling
    )


_MIXTRAL = DecoderFamily(
    model_type="mixtral",
    attention=_PLAIN,
    router=f"{_SPARSE}gate.weight",
    experts=GatedFfn(*(f"{_SPARSE}experts.{{expert}}.{matrix}.weight" for matrix in ("w1", "w3", "w2"))),
    routing=read_gate,
    rotary=MixtralRotaryEmbedding,
    window=_one_window,
)
_QWEN2_MOE = DecoderFamily(
    model_type="qwen2_moe",
    attention=replace(_PLAIN, biased=(_QUERY, _KEY, _VALUE)),
    router=f"{_MLP}gate.weight",
    experts=_QWEN_EXPERTS,
    dense=_QWEN_DENSE,
    shared=SharedExpert(
        GatedFfn(*(f"{_MLP}shared_expert.{matrix}_proj.weight" for matrix in ("gate", "up", "down"))),
        f"{_MLP}shared_expert_gate.weight",
    ),
    routing=read_gate,
    rotary=Qwen2MoeRotaryEmbedding,
    window=_window_by_layer,
)
_QWEN3_MOE = DecoderFamily(
    model_type="qwen3_moe",
    attention=_NORMED,
    router=f"{_MLP}gate.weight",
    experts=_QWEN_EXPERTS,
    dense=_QWEN_DENSE,
    routing=read_gate,
    rotary=Qwen3MoeRotaryEmbedding,
    window=_one_window,
)
_GRANITE_EXPERTS = GatedFfn(None, f"{_SPARSE}input_linear.weight", f"{_SPARSE}output_linear.weight")
_GRANITE_MOE = DecoderFamily(
    model_type="granitemoe",
    attention=_BIASED,
    router=f"{_SPARSE}router.layer.weight",
    experts=_GRANITE_EXPERTS,
    routing=read_gate,
    rotary=GraniteMoeRotaryEmbedding,
    multipliers=_granite_multipliers,
)
_GRANITE_MOE_SHARED = DecoderFamily(
    model_type="granitemoeshared",
    attention=_BIASED,
    router=f"{_SPARSE}router.layer.weight",
    experts=_GRANITE_EXPERTS,
    shared=SharedExpert(
        GatedFfn(None, f"{_LAYER}shared_mlp.input_linear.weight", f"{_LAYER}shared_mlp.output_linear.weight")
    ),
    routing=read_gate,
    rotary=GraniteMoeSharedRotaryEmbedding,
    multipliers=_granite_multipliers,
)
_GLM4_MOE = DecoderFamily(
    model_type="glm4_moe",
    attention=replace(_NORMED, biased=(_QUERY, _KEY, _VALUE)),
    router=f"{_MLP}gate.weight",
    experts=_QWEN_EXPERTS,
    dense=_QWEN_DENSE,
    shared=SharedExpert(GatedFfn(*(f"{_MLP}shared_experts.{matrix}_proj.weight" for matrix in ("gate", "up", "down")))),
    routing=read_gate,
    selection_bias=f"{_MLP}gate.e_score_correction_bias",
    rotary=Glm4MoeRotaryEmbedding,
    refusal=_glm4_moe_refusal,
)
_FLEX_OLMO = DecoderFamily(
    model_type="flex_olmo",
    attention=replace(_NORMED, norm_per_head=False),
    router=f"{_MLP}gate.weight",
    experts=_QWEN_EXPERTS,
    routing=read_gate,
    rotary=FlexOlmoRotaryEmbedding,
    attention_norm=None,
    ffn_norm=None,
    attention_post_norm=f"{_LAYER}post_attention_layernorm.weight",
    ffn_post_norm=f"{_LAYER}post_feedforward_layernorm.weight",
)

_LLAMA = DecoderFamily(model_type="llama", attention=_BIASED, dense=_QWEN_DENSE, rotary=LlamaRotaryEmbedding)

DECODER_FAMILIES: tuple[DecoderFamily, ...] = (
    _MIXTRAL,
    _QWEN2_MOE,
    _QWEN3_MOE,
    _GRANITE_MOE,
    _GRANITE_MOE_SHARED,
    _GLM4_MOE,
    _FLEX_OLMO,
    _LLAMA,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""Rotary variants of the builder.

"dynamic" changes its frequencies beyond `max_position_embeddings` only, where a package ends.
"""


def rotary_switch(config: PreTrainedConfig) -> int | None:
    """The number of tokens beyond which a longrope takes its long factors for all that it reads from then on.

    None where nothing switches. Keys in the cache stay as they were rotated. So a text that comes in pieces has other
    logits than one that is read at once, here as in transformers, whose `dynamic_rope_update` (modeling_rope_utils.py,
    5.23) this is.
    """
    rope = config.rope_parameters or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def find_decoder_family(config: PreTrainedConfig) -> DecoderFamily:
    """The family of a config, its values checked.

    Raises:
        ExportError: the architecture, activation or rotary variant is not covered.
    """
    refusal = find_refusal(config)
    if refusal is not None:
        raise ExportError(refusal)
    return next(f for f in DECODER_FAMILIES if f.model_type == config.model_type)


def find_refusal(config: PreTrainedConfig) -> str | None:
    """Why the graph builder does not cover a config, or None."""
    family = next((f for f in DECODER_FAMILIES if f.model_type == config.model_type), None)
    if family is None:
        supported = ", ".join(f.model_type for f in DECODER_FAMILIES)
        return f"config.json: model_type {config.model_type} has no ONNX builder yet; supported: {supported}"
    if config.hidden_act not in get_args(Activation):
        return f"config.json: hidden_act is {config.hidden_act}; the builder covers {', '.join(get_args(Activation))}"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        return f"config.json: rope_type is {rope_type}; the builder covers {', '.join(ROPE_TYPES)}"
    refusal = family.refusal(config)
    return None if refusal is None else f"config.json: {refusal}"
