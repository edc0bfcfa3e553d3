"""Llama and its kin: gated FFNs, whatever else differs."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.architecture import Condition
from dense2moe.upcycle.models.host import READ_FROM, Host, HostHead, HostStack

_LLAMA_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="layers.{layer}",
    ffn="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="post_attention_layernorm",
)
_FUSED_LAYER = replace(_LLAMA_LAYER, gate=None, gate_rows="first", up="mlp.gate_up_proj")
_MODERN_LAYER = replace(
    _LLAMA_LAYER,
    gate=None,
    gate_rows="first",
    up="mlp.Wi",
    down="mlp.Wo",
    norm="mlp_norm",
    activation="hidden_activation",
    inner_dropout="mlp_dropout",
)
_GEMMA_LAYER = replace(
    _LLAMA_LAYER, norm="pre_feedforward_layernorm", norm_adds_one=True, activation="hidden_activation"
)
_PARALLEL_LAYER = replace(_LLAMA_LAYER, norm="input_layernorm")
_POST_NORM_LAYER = replace(
    _LLAMA_LAYER,
    norm=None,
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)
_LFM2_LAYER = replace(
    _LLAMA_LAYER,
    ffn="feed_forward",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    norm="ffn_norm",
    activation_name="silu",
)
_ONE_WIDTH = Condition(
    lambda config: not (config.use_double_wide_mlp and config.num_kv_shared_layers),
    lambda config: "use_double_wide_mlp is True; it must be False: all experts have one width",
)
_DENSE = Condition(
    lambda config: not config.enable_moe_block,
    lambda config: "enable_moe_block is True; it must be False: a mixture is made of a dense model",
)
_FREQUENCIES = "*rotary_emb.inv_freq"  # a buffer that old checkpoints store


def _llama(model_type: str, start: str, layer: HostStack = _LLAMA_LAYER, oldest: str = "4.57.0") -> Host:
    return Host(
        model_type=model_type,
        base=f"{start}Model",
        prefix="model",
        stacks=(layer,),
        embedding="embed_tokens" if layer.norm is None else None,
        dropped=(_FREQUENCIES,),
        oldest_transformers=oldest,
    )


def with_answers(host: Host) -> Host:
    """A family whose class for question answering calls its base model `transformer`."""
    head = HostHead("question-answering", prefix="transformer")
    return replace(host, heads={f"{host.start}ForQuestionAnswering": head})


HOSTS: tuple[Host, ...] = (
    _llama("cohere", "Cohere", _PARALLEL_LAYER),
    _llama("cohere2", "Cohere2", _PARALLEL_LAYER),
    _llama("cwm", "Cwm", oldest=READ_FROM),
    with_answers(_llama("diffllama", "DiffLlama")),
    _llama("ernie4_5", "Ernie4_5"),
    replace(_llama("esmc", "Esmc", oldest=READ_FROM), prefix="esmc"),
    _llama("eurobert", "EuroBert", oldest=READ_FROM),
    with_answers(_llama("exaone4", "Exaone4", _POST_NORM_LAYER)),
    _llama("gemma", "Gemma", replace(_LLAMA_LAYER, norm_adds_one=True)),
    _llama("gemma2", "Gemma2", _GEMMA_LAYER),
    replace(
        _llama("gemma3_text", "Gemma3Text", _GEMMA_LAYER, READ_FROM),
        heads={"Gemma3ForCausalLM": HostHead("text-generation")},
    ),
    replace(
        _llama("gemma4_text", "Gemma4Text", replace(_GEMMA_LAYER, norm_adds_one=False), READ_FROM),
        heads={"Gemma4ForCausalLM": HostHead("text-generation")},
        conditions=(_ONE_WIDTH, _DENSE),
    ),
    _llama("glm", "Glm", _FUSED_LAYER),
    _llama("glm4", "Glm4", _FUSED_LAYER),
    _llama("granite", "Granite"),
    _llama("granite_swa", "GraniteSWA", oldest=READ_FROM),
    replace(
        _llama("gte", "Gte", replace(_LLAMA_LAYER, inner_dropout="hidden_dropout_prob"), READ_FROM),
        prefix="gte",
        zero_router="rounding",  # GELU of a gate is computed in another way where it lies between other numbers
    ),
    _llama("helium", "Helium"),
    _llama("hunyuan_v1_dense", "HunYuanDenseV1"),
    _llama("lfm2", "Lfm2", _LFM2_LAYER),
    with_answers(_llama("llama", "Llama")),
    with_answers(_llama("ministral", "Ministral", oldest=READ_FROM)),
    _llama("ministral3", "Ministral3", oldest=READ_FROM),
    _llama("mistral", "Mistral"),
    _llama("modernbert", "ModernBert", _MODERN_LAYER),
    _llama("modernbert-decoder", "ModernBertDecoder", _MODERN_LAYER),
    replace(_llama("nomic_bert", "NomicBert", oldest=READ_FROM), prefix="nomic_bert"),
    _llama("olmo", "Olmo", replace(_LLAMA_LAYER, norm=None)),
    _llama("olmo2", "Olmo2", _POST_NORM_LAYER),
    _llama("olmo3", "Olmo3", _POST_NORM_LAYER),
    _llama("phi3", "Phi3", _FUSED_LAYER),
    with_answers(_llama("qwen2", "Qwen2")),
    with_answers(_llama("qwen3", "Qwen3")),
    with_answers(_llama("seed_oss", "SeedOss", replace(_LLAMA_LAYER, dropout="residual_dropout"))),
    with_answers(_llama("smollm3", "SmolLM3")),
    _llama("stablelm", "StableLm", replace(_LLAMA_LAYER, other_norms=("input_layernorm",))),
    _llama("vaultgemma", "VaultGemma", _GEMMA_LAYER, READ_FROM),
)
