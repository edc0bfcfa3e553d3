"""Rows of the table of hosts that read text; see `hosts`."""

from __future__ import annotations

import transformers
from host_row import ENCODER, HEADS, HIDDEN, INNER, LAYERS, VOCABULARY, HostRow

from dense2moe.upcycle.models.heads import TASK_OF_HEAD
from dense2moe.upcycle.models.table import find_host

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**ENCODER, **IDS, "num_key_value_heads": 2}
GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCABULARY, **IDS}
ROTARY = {**GPT2, "rotary_dim": 4, "n_ctx": 64}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def row(start: str, end: str, values: dict[str, object], shape: str = "", refused: tuple[str, ...] = ()) -> HostRow:
    """A family whose classes begin with `start`: first the one with this end, then all others that it converts."""
    others = (f"{start}{other}" for other in TASK_OF_HEAD if other != end)
    family = find_host(getattr(transformers, f"{start}{end}").config_class.model_type)
    assert family is not None, f"no table has {start}"
    more = tuple(name for name in others if hasattr(transformers, name) and family.find_task(name) is not None)
    return HostRow(f"{start}{end}", values, shape, more, refused)


MASKED, CAUSAL = "ForMaskedLM", "ForCausalLM"

TEXT_ROWS: dict[str, HostRow] = {
    "albert": row("Albert", MASKED, {**ENCODER, "num_hidden_groups": 1, "embedding_size": 16}, "one FFN in all layers"),
    "apertus": row("Apertus", CAUSAL, DECODER, "an activation that learns"),
    "arcee": row("Arcee", CAUSAL, {**DECODER, "mlp_bias": True}),
    "bert": row("Bert", MASKED, ENCODER, "split over two modules"),
    "bert-generation": HostRow(
        "BertGenerationDecoder", {**ENCODER, **IDS, "is_decoder": True}, more=("BertGenerationEncoder",)
    ),
    "big-bird": HostRow(
        "BigBirdForMaskedLM",
        {**ENCODER, "attention_type": "original_full"},
        more=("BigBirdModel", "BigBirdForTokenClassification", "BigBirdForSequenceClassification"),
    ),
    "biogpt": row("BioGpt", CAUSAL, {**ENCODER, **IDS}, "within the layer"),
    "bloom": row(
        "Bloom", CAUSAL, {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY, **IDS}
    ),
    "camembert": row("Camembert", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}),
    "codegen": row("CodeGen", CAUSAL, {**ROTARY, "n_embd": 64}),
    "cohere": row("Cohere", CAUSAL, DECODER, "gated, in parallel"),
    "cohere2": row("Cohere2", CAUSAL, {**DECODER, **WINDOWS}),
    "convbert": row("ConvBert", MASKED, {**ENCODER, "embedding_size": HIDDEN}),
    "cwm": row("Cwm", CAUSAL, {**DECODER, **WINDOWS, "head_dim": 8}),
    "data2vec-text": row("Data2VecText", MASKED, ENCODER),
    "deberta": row(
        "Deberta", MASKED, {**ENCODER, "type_vocab_size": 2, "relative_attention": True}, refused=("bfloat16",)
    ),
    "deberta-v2": row(
        "DebertaV2",
        MASKED,
        {
            **ENCODER,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 16,
        },
    ),
    "diffllama": row("DiffLlama", CAUSAL, DECODER),
    "distilbert": row(
        "DistilBert",
        MASKED,
        {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCABULARY},
    ),
    "electra": row("Electra", MASKED, {**ENCODER, "embedding_size": 16}),
    "ernie": row("Ernie", MASKED, {**ENCODER, "use_task_id": True, "task_type_vocab_size": 3}),
    "ernie4_5": row("Ernie4_5", CAUSAL, {**DECODER, "head_dim": 8, "use_bias": True}),
    "esm": row(
        "Esm",
        MASKED,
        {**ENCODER, "pad_token_id": 1, "mask_token_id": 3, "token_dropout": True, "position_embedding_type": "rotary"},
    ),
    "esmc": row("Esmc", MASKED, {**ENCODER, "pad_token_id": 1}),
    "eurobert": row("EuroBert", MASKED, DECODER),
    "exaone4": row("Exaone4", CAUSAL, {**DECODER, **WINDOWS, "head_dim": 8}),
    "falcon": row(
        "Falcon",
        CAUSAL,
        {**ENCODER, **IDS, "ffn_hidden_size": INNER, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-7b": row("Falcon", CAUSAL, {**ENCODER, **IDS, "ffn_hidden_size": INNER, "multi_query": True}),
    "falcon-rw": row(
        "Falcon",
        CAUSAL,
        {**ENCODER, **IDS, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    "fnet": row("FNet", MASKED, {**ENCODER, "use_tpu_fourier_optimizations": False}, refused=("bfloat16",)),
    "gemma": row("Gemma", CAUSAL, {**DECODER, "head_dim": 8}),
    "gemma2": row("Gemma2", CAUSAL, {**DECODER, **WINDOWS, "head_dim": 8}),
    "gemma3-text": HostRow(
        "Gemma3ForCausalLM",
        {**DECODER, **WINDOWS, "head_dim": 8},
        more=("Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    ),
    "gemma4-text": HostRow(
        "Gemma4ForCausalLM",
        {
            **DECODER,
            **WINDOWS,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        more=("Gemma4TextModel",),
    ),
    "glm": row("Glm", CAUSAL, {**DECODER, "head_dim": 8}, "gate and up in one matrix"),
    "glm4": row("Glm4", CAUSAL, {**DECODER, "head_dim": 8}),
    "gpt2": row("GPT2", "LMHeadModel", GPT2, "Conv1D"),
    "gpt-bigcode": row("GPTBigCode", CAUSAL, GPT2),
    "gpt-neo": row(
        "GPTNeo",
        CAUSAL,
        {
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
            **IDS,
        },
    ),
    "gpt-neox": row("GPTNeoX", CAUSAL, {**ENCODER, **IDS, "rotary_pct": 0.5}, "ungated, in parallel"),
    "gpt-neox-japanese": row("GPTNeoXJapanese", CAUSAL, {**ENCODER, **IDS, "intermediate_multiple_size": 2}),
    "gptj": row("GPTJ", CAUSAL, ROTARY),
    "granite": row("Granite", CAUSAL, {**DECODER, "residual_multiplier": 0.5, "mlp_bias": True}),
    "granite-swa": row("GraniteSWA", CAUSAL, {**DECODER, **WINDOWS}),
    "gte": row("Gte", MASKED, {**ENCODER, "hidden_dropout_prob": 0.0}, "gated, with a bias behind alone"),
    "helium": row("Helium", CAUSAL, {**DECODER, "head_dim": 8}),
    "hunyuan-v1-dense": row("HunYuanDenseV1", CAUSAL, {**DECODER, "head_dim": 8}),
    "jais2": row("Jais2", CAUSAL, {**DECODER, "head_dim": 8}),
    "jina-embeddings-v3": row("JinaEmbeddingsV3", MASKED, ENCODER),
    "layoutlm": row("LayoutLM", MASKED, {**ENCODER, "max_2d_position_embeddings": 64}),
    "lfm2": row(
        "Lfm2",
        CAUSAL,
        {**DECODER, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    ),
    "llama": row("Llama", CAUSAL, {**DECODER, "mlp_bias": True}, "gated, with biases"),
    "longformer": row("Longformer", MASKED, {**ENCODER, **IDS, "pad_token_id": 1, "attention_window": 4}),
    "luke": row("Luke", MASKED, {**ENCODER, **IDS, "entity_vocab_size": 8, "entity_emb_size": 16}),
    "markuplm": row("MarkupLM", "ForTokenClassification", {**ENCODER, **IDS}),
    "megatron-bert": row("MegatronBert", MASKED, ENCODER),
    "ministral": row("Ministral", CAUSAL, {**DECODER, **WINDOWS, "head_dim": 8}),
    "ministral3": row("Ministral3", CAUSAL, {**DECODER, "head_dim": 8}),
    "mistral": row("Mistral", CAUSAL, {**DECODER, "sliding_window": 8}),
    "modernbert": row(
        "ModernBert",
        MASKED,
        {
            **ENCODER,
            **IDS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 8,
            "mlp_dropout": 0.1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "gated, with a dropout within",
    ),
    "modernbert-decoder": row(
        "ModernBertDecoder",
        CAUSAL,
        {
            **ENCODER,
            **IDS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "mpnet": row("MPNet", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}),
    "mpt": row(
        "Mpt",
        CAUSAL,
        {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "vocab_size": VOCABULARY, **IDS},
        "within a module that adds the residual stream",
    ),
    "nanochat": row("NanoChat", CAUSAL, DECODER),
    "nemotron": row("Nemotron", CAUSAL, DECODER),
    "nomic-bert": row("NomicBert", MASKED, ENCODER),
    "olmo": row("Olmo", CAUSAL, DECODER),
    "olmo2": row("Olmo2", CAUSAL, DECODER),
    "olmo3": row("Olmo3", CAUSAL, {**DECODER, **WINDOWS}, "gated, on the residual stream"),
    "openai-gpt": row("OpenAIGPT", "LMHeadModel", GPT2),
    "opt": row("OPT", CAUSAL, {**ENCODER, **IDS, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "opt-350m": row(
        "OPT",
        CAUSAL,
        {**ENCODER, **IDS, "ffn_dim": INNER, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "persimmon": row("Persimmon", CAUSAL, {**ENCODER, **IDS}),
    "phi": row("Phi", CAUSAL, {**DECODER, "partial_rotary_factor": 0.5}),
    "phi3": row("Phi3", CAUSAL, DECODER),
    "qwen2": row("Qwen2", CAUSAL, DECODER),
    "qwen3": row("Qwen3", CAUSAL, {**DECODER, "head_dim": 8}),
    "rembert": row("RemBert", MASKED, {**ENCODER, "input_embedding_size": 16, "output_embedding_size": 24}),
    "roberta": row("Roberta", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}),
    "roberta-prelayernorm": row(
        "RobertaPreLayerNorm", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}, "behind a norm of its own module"
    ),
    "roformer": row("RoFormer", MASKED, ENCODER),
    "seed-oss": row("SeedOss", CAUSAL, {**DECODER, "head_dim": 8, "mlp_bias": True}),
    "smollm3": row("SmolLM3", CAUSAL, {**DECODER, "no_rope_layers": [1, 0]}),
    "splinter": row("Splinter", "ForQuestionAnswering", {**ENCODER, **IDS}),
    "stablelm": row("StableLm", CAUSAL, DECODER),
    "stablelm-parallel": row("StableLm", CAUSAL, {**DECODER, "use_parallel_residual": True}),
    "starcoder2": row("Starcoder2", CAUSAL, DECODER),
    "vaultgemma": row("VaultGemma", CAUSAL, {**DECODER, **WINDOWS, "head_dim": 8}),
    "xglm": row(
        "XGLM",
        CAUSAL,
        {
            "d_model": HIDDEN,
            "ffn_dim": INNER,
            "num_layers": LAYERS,
            "attention_heads": HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            **IDS,
        },
    ),
    "xlm-roberta": row("XLMRoberta", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}),
    "xlm-roberta-xl": row("XLMRobertaXL", MASKED, {**ENCODER, **IDS, "pad_token_id": 1}),
}
