"""Facts about dense families: where their tensors lie, and which have no twin.

Everything but the FFN is told in Llama's names, which all native decoder targets share: a family says from which of its
tensors each of these comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Callable[[Any], tuple[int, int]]
"""From a config to the first row, and the one after the last, of a part of a fused tensor."""


@dataclass(frozen=True)
class AddOne:
    """Fold a norm that multiplies by 1 + w into one that multiplies by w."""


@dataclass(frozen=True)
class MultiplyByRootOfWidth:
    """Fold an embedding that the model multiplies by the root of its hidden size."""


Fold = AddOne | MultiplyByRootOfWidth
"""A change of a weight that moves arithmetic of the dense model into it.

Done, and stored, in float32: no rounding of ours.
"""


@dataclass(frozen=True)
class Matrix:
    """Where one matrix or vector lies.

    A tensor, with `{layer}` where there is one a layer, or some rows of a fused one.
    """

    name: str
    rows: Rows | None = None
    fold: Fold | None = None


@dataclass(frozen=True)
class RouterInput:
    """What a router reads, for the size of its logits: vectors of unit mean square, each times the scale of a norm.

    `norms` are of the router's own layer, `earlier` of the layers before it: the residual stream of a model with norms
    after its blocks is the sum of all of these and the embedding.
    """

    norms: tuple[str, ...]
    earlier: tuple[str, ...] = ()
    embedding: str | None = None


@dataclass(frozen=True)
class Ffn:
    """One FFN a layer: its matrices (no gate where it has none), what a router in its place reads.

    And how many layers there are.
    """

    num_layers: str  # the config's field
    gate: Matrix | None
    up: Matrix
    down: Matrix
    router_input: RouterInput


@dataclass(frozen=True)
class DenseFamily:
    """One dense architecture of transformers.

    `moves` says where each tensor of the target, by name, comes from; a name that the checkpoint's own model does not
    have is passed over, and a tensor of the checkpoint that nothing reads is refused by the plan. `dropped` are tensors
    that old checkpoints carry and no forward pass reads.
    """

    model_type: str
    architecture: str
    task: str  # as Hugging Face names tasks
    ffns: tuple[Ffn, ...]
    moves: Mapping[str, Matrix]
    dropped: tuple[str, ...]
    # the module that reads what a router in its place would, below the base model; None where layers cannot be run
    # alone
    ffn_module: str | None


_LAYER = "model.layers.{layer}."
_DROPPED = (f"{_LAYER}self_attn.rotary_emb.inv_freq",)
_NORMS = ("model.norm.weight", f"{_LAYER}input_layernorm.weight", f"{_LAYER}post_attention_layernorm.weight")
_LLAMA_MOVES = {
    name: Matrix(name)
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        f"{_LAYER}input_layernorm.weight",
        *(f"{_LAYER}self_attn.{matrix}_proj.{kind}" for matrix in "qkvo" for kind in ("weight", "bias")),
        f"{_LAYER}self_attn.q_norm.weight",
        f"{_LAYER}self_attn.k_norm.weight",
        f"{_LAYER}post_attention_layernorm.weight",
        f"{_LAYER}post_feedforward_layernorm.weight",
    )
}
_PRE_NORM = RouterInput((f"{_LAYER}post_attention_layernorm.weight",))
_POST_NORM = RouterInput(
    norms=(f"{_LAYER}post_attention_layernorm.weight",),
    earlier=(f"{_LAYER}post_attention_layernorm.weight", f"{_LAYER}post_feedforward_layernorm.weight"),
    embedding="model.embed_tokens.weight",
)


def _llama_ffn(router_input: RouterInput = _PRE_NORM) -> Ffn:
    gate, up, down = (Matrix(f"{_LAYER}mlp.{matrix}_proj.weight") for matrix in ("gate", "up", "down"))
    return Ffn("num_hidden_layers", gate, up, down, router_input)


def _llama_shaped(model_type: str, architecture: str, ffn: Ffn, moves: Mapping[str, Matrix]) -> DenseFamily:
    return DenseFamily(model_type, architecture, "text-generation", (ffn,), moves, _DROPPED, "layers.{layer}.mlp")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _query_rows(config: Any) -> tuple[int, int]:
    return 0, config.num_attention_heads * _head_dim(config)


def _key_rows(config: Any) -> tuple[int, int]:
    start = _query_rows(config)[1]
    return start, start + config.num_key_value_heads * _head_dim(config)


def _value_rows(config: Any) -> tuple[int, int]:
    start = _key_rows(config)[1]
    return start, start + config.num_key_value_heads * _head_dim(config)


LLAMA = _llama_shaped("llama", "LlamaForCausalLM", _llama_ffn(), _LLAMA_MOVES)
MISTRAL = _llama_shaped("mistral", "MistralForCausalLM", _llama_ffn(), _LLAMA_MOVES)
QWEN2 = _llama_shaped("qwen2", "Qwen2ForCausalLM", _llama_ffn(), _LLAMA_MOVES)
QWEN3 = _llama_shaped("qwen3", "Qwen3ForCausalLM", _llama_ffn(), _LLAMA_MOVES)
OLMO2 = _llama_shaped("olmo2", "Olmo2ForCausalLM", _llama_ffn(_POST_NORM), _LLAMA_MOVES)
GRANITE = _llama_shaped("granite", "GraniteForCausalLM", _llama_ffn(), _LLAMA_MOVES)

PHI3 = _llama_shaped(
    "phi3",
    "Phi3ForCausalLM",
    Ffn(
        "num_hidden_layers",
        gate=Matrix(f"{_LAYER}mlp.gate_up_proj.weight", lambda c: (0, c.intermediate_size)),
        up=Matrix(f"{_LAYER}mlp.gate_up_proj.weight", lambda c: (c.intermediate_size, 2 * c.intermediate_size)),
        down=Matrix(f"{_LAYER}mlp.down_proj.weight"),
        router_input=_PRE_NORM,
    ),
    _LLAMA_MOVES
    | {
        f"{_LAYER}self_attn.q_proj.weight": Matrix(f"{_LAYER}self_attn.qkv_proj.weight", _query_rows),
        f"{_LAYER}self_attn.k_proj.weight": Matrix(f"{_LAYER}self_attn.qkv_proj.weight", _key_rows),
        f"{_LAYER}self_attn.v_proj.weight": Matrix(f"{_LAYER}self_attn.qkv_proj.weight", _value_rows),
    },
)

# Gemma multiplies the embedding's output by the root of the hidden size, and norms multiply by 1 + w. Its head is the
# embedding itself, not multiplied: the target has to store both.
GEMMA = _llama_shaped(
    "gemma",
    "GemmaForCausalLM",
    _llama_ffn(),
    _LLAMA_MOVES
    | {
        "model.embed_tokens.weight": Matrix("model.embed_tokens.weight", fold=MultiplyByRootOfWidth()),
        "lm_head.weight": Matrix("model.embed_tokens.weight"),
    }
    | {name: Matrix(name, fold=AddOne()) for name in _NORMS},
)


def _t5_ffn(stack: str, layer: int, num_layers: str) -> Ffn:
    block = f"{stack}.block.{{layer}}.layer.{layer}."
    wi, wo = (Matrix(f"{block}DenseReluDense.{matrix}.weight") for matrix in ("wi", "wo"))
    return Ffn(num_layers, None, wi, wo, RouterInput((f"{block}layer_norm.weight",)))


T5 = DenseFamily(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    task="text2text-generation",
    ffns=(_t5_ffn("encoder", 1, "num_layers"), _t5_ffn("decoder", 2, "num_decoder_layers")),
    moves={
        name: Matrix(name)
        for name in (
            "shared.weight",
            "encoder.final_layer_norm.weight",
            "decoder.final_layer_norm.weight",
            *(
                f"{stack}.block.{{layer}}.layer.{layer}.{name}.weight"
                for stack, layers in (
                    ("encoder", ("SelfAttention",)),
                    ("decoder", ("SelfAttention", "EncDecAttention")),
                )
                for layer, attention in enumerate(layers)
                for name in (
                    *(f"{attention}.{matrix}" for matrix in "qkvo"),
                    f"{attention}.relative_attention_bias",
                    "layer_norm",
                )
            ),
            "encoder.block.{layer}.layer.1.layer_norm.weight",
            "decoder.block.{layer}.layer.2.layer_norm.weight",
        )
    },
    dropped=("decoder.block.{layer}.layer.1.EncDecAttention.relative_attention_bias.weight",),
    ffn_module=None,
)

DENSE_FAMILIES: tuple[DenseFamily, ...] = (LLAMA, MISTRAL, PHI3, GEMMA, QWEN2, QWEN3, OLMO2, GRANITE, T5)


@dataclass(frozen=True)
class NoTwin:
    """Why no mixture-of-experts architecture of transformers holds a dense family.

    And the target that comes nearest.
    """

    reason: str
    nearest: str | None = None


_UNGATED = NoTwin("LayerNorm, and an FFN with biases and without a gate")
_ENCODER = NoTwin("a bidirectional encoder with an ungated FFN with biases")
NO_TWIN: Mapping[str, NoTwin] = {
    "gemma2": NoTwin("soft caps on attention scores and logits, and norms on both sides of the FFN", "mixtral"),
    "gemma3_text": NoTwin("norms on both sides of the FFN, and another rotary base in every sixth layer", "qwen3_moe"),
    "phi": NoTwin("attention and FFN in parallel, LayerNorm, and an FFN with biases and without a gate"),
    "gpt_neox": NoTwin("attention and FFN in parallel, LayerNorm, and an FFN with biases and without a gate"),
    "gptj": NoTwin("attention and FFN in parallel, and an FFN with biases and without a gate"),
    "falcon": NoTwin("attention and FFN in parallel, LayerNorm, and an FFN without a gate"),
    "cohere": NoTwin("attention and FFN in parallel, LayerNorm, and scaled logits", "granitemoe"),
    "cohere2": NoTwin("attention and FFN in parallel, LayerNorm, and scaled logits", "granitemoe"),
    "stablelm": NoTwin("LayerNorm with biases, and rotary embeddings of a part of each head", "mixtral"),
    "olmo": NoTwin("a norm without weights that subtracts the mean", "mixtral"),
    "glm": NoTwin("rotary embeddings of a part of each head, interleaved", "mixtral"),
    "glm4": NoTwin("norms on both sides of attention and FFN, and interleaved rotary embeddings", "mixtral"),
    "smollm3": NoTwin("layers without rotary embeddings", "mixtral"),
    "ernie4_5": NoTwin("interleaved rotary embeddings", "mixtral"),
    "helium": NoTwin("interleaved rotary embeddings", "mixtral"),
    "hunyuan_v1_dense": NoTwin("norms of query and key behind the rotary embedding", "qwen3_moe"),
    "exaone4": NoTwin("norms behind the blocks, and windows and no rotary embedding in some layers", "flex_olmo"),
    "olmo3": NoTwin("norms behind the blocks, and windows in some layers", "flex_olmo"),
    "gemma4_text": NoTwin("norms on both sides of the FFN, and layers that share keys and values", "qwen3_moe"),
    "diffllama": NoTwin("differential attention", "mixtral"),
    "bitnet": NoTwin("norms inside attention and FFN, and weights of three values", "mixtral"),
    "arcee": NoTwin("an FFN without a gate"),
    "apertus": NoTwin("an FFN without a gate"),
    "nemotron": NoTwin("LayerNorm, and an FFN without a gate"),
    "starcoder2": _UNGATED,
    "gpt2": _UNGATED,
    "gpt_bigcode": _UNGATED,
    "gpt_neo": _UNGATED,
    "opt": _UNGATED,
    "bloom": _UNGATED,
    "mpt": NoTwin("ALiBi positions, LayerNorm, and an FFN without a gate"),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "distilbert": _ENCODER,
    "electra": _ENCODER,
    "deberta-v2": _ENCODER,
    "modernbert": NoTwin("a bidirectional encoder"),
    "vit": _ENCODER,
    "deit": _ENCODER,
    "bart": NoTwin("LayerNorm after each block, and an ungated FFN with biases", "switch_transformers"),
    "mt5": NoTwin("a gated FFN, where the only encoder-decoder target has none", "switch_transformers"),
    "umt5": NoTwin("a gated FFN, where the only encoder-decoder target has none", "switch_transformers"),
}
"""Families that users ask for and that have no native twin; our own layer of experts is to take their FFN's place."""


@dataclass(frozen=True)
class Trait:
    """What a config shows by having a value in one of these fields, that no target of ours has."""

    fields: tuple[str, ...]
    reason: str


TRAITS: tuple[Trait, ...] = (
    Trait(("vision_config", "audio_config", "text_config"), "parts that read images or sound beside the text model"),
    Trait(("kv_lora_rank",), "latent attention"),
    Trait(("attn_logit_softcapping", "final_logit_softcapping"), "soft caps on attention scores or logits"),
    Trait(
        (
            "state_size",
            "ssm_state_size",
            "mamba_d_state",
            "mamba_d_ssm",
            "lru_width",
            "linear_conv_kernel_dim",
            "conv_L_cache",
            "mlstm_round_up_to_multiple_of",
        ),
        "layers of a state space, a recurrence or a convolution",
    ),
    Trait(("parallel_attn", "use_parallel_residual"), "attention and FFN in parallel"),
    Trait(("alibi",), "ALiBi positions"),
    Trait(("no_rope_layers", "no_rope_layer_interval"), "layers without rotary embeddings"),
    Trait(("attention_chunk_size",), "attention within chunks"),
    Trait(("is_encoder_decoder",), "an encoder"),
    Trait(("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), "LayerNorm"),
)
"""For families that no table names."""
