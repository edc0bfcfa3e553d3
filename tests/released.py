"""Config, tokenizer and generation files with every field of the files of well-known releases.

For models of tiny weights.
Field names and values are the releases' own; sizes and token ids are those of the tiny models.
"""

from __future__ import annotations

from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}
COMMON = SIZES | {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
}
LONG = [1.0 + n / 2 for n in range(4)]
SPIECE = {
    "add_bos_token": True,
    "add_eos_token": False,
    "additional_special_tokens": [],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
BYTES = {
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": True,
    "eos_token": "</s>",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
QWEN_TOKENIZER = {
    "add_prefix_space": False,
    "additional_special_tokens": ["<s>", "</s>"],
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<s>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"

PHI3 = COMMON | {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
    "model_type": "phi3",
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 256,
    "pad_token_id": 1,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 100,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.2",
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 5, 6],
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
}
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.0.dev0",
}
QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 256,
    "tie_word_embeddings": True,
    "transformers_version": "4.40.1",
    "use_sliding_window": False,
}
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
GEMMA = COMMON | {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 1,
    "head_dim": 16,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "model_type": "gemma",
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "transformers_version": "4.38.0.dev0",
}
OLD = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "transformers_version": "4.36.0"}

# Of each release: config, tokenizer's config (with a chat template), generation config.
RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Phi-3-mini-4k-instruct": (
        PHI3,
        SPIECE
        | {
            "add_bos_token": False,
            "legacy": False,
            "model_max_length": 4096,
            "pad_token": "</s>",
            "padding_side": "left",
        },
        OLD | {"eos_token_id": [1, 5, 6], "pad_token_id": 1},
    ),
    "Phi-3-mini-128k-instruct": (
        PHI3
        | {
            "_name_or_path": "Phi-3-mini-128k-instruct",
            "original_max_position_embeddings": 64,
            "sliding_window": 262144,
            "rope_scaling": {"long_factor": LONG, "short_factor": [1.0] * 4, "type": "longrope"},
        },
        SPIECE
        | {
            "add_bos_token": False,
            "legacy": False,
            "model_max_length": 131072,
            "pad_token": "</s>",
            "padding_side": "left",
        },
        OLD | {"eos_token_id": [1, 5, 6], "pad_token_id": 1},
    ),
    "Mistral-7B-v0.1": (
        MISTRAL | {"rope_theta": 10000.0, "sliding_window": 100, "transformers_version": "4.34.0.dev0"},
        SPIECE,
        OLD,
    ),
    "Mistral-7B-Instruct-v0.3": (
        MISTRAL,
        SPIECE | {"add_prefix_space": True, "legacy": False},
        OLD | {"transformers_version": "4.42.0.dev0"},
    ),
    "Llama-2-7b": (
        LLAMA
        | {
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
            "eos_token_id": 1,
            "pretraining_tp": 2,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
            "max_sequence_length": 2048,
            "transformers_version": "4.31.0.dev0",
            "quantization_config": None,
        },
        SPIECE | {"legacy": False, "padding_side": "right"},
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "do_sample": True,
            "eos_token_id": 1,
            "max_length": 4096,
            "pad_token_id": 0,
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.32.0.dev0",
        },
    ),
    "Llama-3.1-8B-Instruct": (
        LLAMA,
        BYTES,
        {
            "bos_token_id": 0,
            "do_sample": True,
            "eos_token_id": [1, 5, 6],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
    ),
    "Llama-3.2-1B-Instruct": (
        LLAMA
        | {
            "head_dim": 8,
            "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0},
            "tie_word_embeddings": True,
            "transformers_version": "4.45.0.dev0",
        },
        BYTES,
        {
            "bos_token_id": 0,
            "do_sample": True,
            "eos_token_id": [1, 5, 6],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.45.0.dev0",
        },
    ),
    "Qwen2-0.5B-Instruct": (
        QWEN2,
        QWEN_TOKENIZER,
        {
            "bos_token_id": 0,
            "pad_token_id": 0,
            "do_sample": True,
            "eos_token_id": [1, 0],
            "repetition_penalty": 1.1,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
    ),
    "Qwen3-0.6B": (
        QWEN3,
        QWEN_TOKENIZER | {"add_bos_token": False},
        {
            "bos_token_id": 0,
            "do_sample": True,
            "eos_token_id": [1, 0],
            "pad_token_id": 0,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    ),
    "gemma-2b-it": (
        GEMMA,
        SPIECE | {"tokenizer_class": "GemmaTokenizer", "pad_token": "<s>"},
        OLD | {"pad_token_id": 0},
    ),
    "gemma-1.1-2b-it": (
        {name: value for name, value in GEMMA.items() if name not in ("rope_scaling", "hidden_activation")}
        | {"hidden_activation": None},
        SPIECE | {"tokenizer_class": "GemmaTokenizer", "pad_token": "<s>"},
        OLD | {"pad_token_id": 0},
    ),
}
