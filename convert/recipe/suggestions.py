"""Suggestions for misspelt keys."""

from __future__ import annotations

import difflib
from typing import Final

from pydantic import BaseModel

# Words for a key that other tools use, and that are not spelled like it.
ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "source": ("model", "checkpoint", "base_model", "dense"),
    "data": ("dataset", "corpus"),
    "finetune": ("training", "train", "trainer"),
    "variants": ("precisions", "dtypes", "formats"),
    "export": ("onnx", "graph"),
    "hub": ("repo", "repo_id", "model_id", "id"),
    "path": ("dir", "directory", "folder", "dataset", "repo", "repo_id", "id"),
    "revision": ("commit", "sha", "rev", "tag", "branch"),
    "kind": ("type",),
    "train": ("files", "paths"),
    "separator": ("delimiter", "split"),
    "text_column": ("column", "field", "text"),
    "block_size": ("seq_len", "sequence_length", "context_length", "max_length", "group_size"),
    "target": ("target_model_type", "target_architecture", "architecture", "moe_type"),
    "layers": ("layer", "moe_layers", "sparse_layers", "mlp_only_layers", "decoder_sparse_step"),
    "shared_expert": ("shared", "shared_experts", "n_shared_experts"),
    "drop": ("drop_ratio", "drop_rate", "dropout", "ratio", "reinit"),
    "granularity": ("shards", "virtual_groups", "fine_grained"),
    "domains": ("experts", "prompts", "positive_prompts"),
    "penalty": ("ridge", "lambda", "alpha", "l2"),
    "num_experts": ("e", "experts", "n_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("k", "topk", "top_k", "router_topk", "num_selected_experts"),
    "noise": ("jitter", "std"),
    "logit_std": ("std", "init_std", "initializer_range"),
    "steps": ("epochs", "num_epochs", "num_train_epochs", "max_steps", "iterations"),
    "batch_size": ("batch", "per_device_train_batch_size", "micro_batch_size"),
    "gradient_accumulation_steps": ("grad_accum", "accumulation"),
    "learning_rate": ("lr",),
    "expert_learning_rate": ("expert_lr", "experts_lr"),
    "router_learning_rate": ("router_lr",),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "stages": ("phases", "curriculum"),
    "gradient_checkpointing": ("activation_checkpointing", "checkpointing"),
    "z_coefficient": ("z_loss", "router_z_loss", "router_z_loss_coef"),
    "distillation": ("distill", "teacher", "kd"),
    "expert_dropout": ("dropout", "moe_dropout"),
    "lora_rank": ("rank", "lora_r"),
    "prompt_tokens": ("num_virtual_tokens", "virtual_tokens"),
    "weight_decay": ("wd",),
    "warmup_steps": ("warmup",),
    "max_grad_norm": ("clip", "grad_clip", "gradient_clipping"),
    "balance_coefficient": ("aux_loss", "aux_loss_coef", "router_aux_loss_coef", "load_balance"),
    "precision": ("dtype", "torch_dtype", "amp"),
    "control": ("baseline",),
}


def suggest(name: str, record: type[BaseModel]) -> str:
    """The key that was probably meant, as a question.

    Empty if none is near.
    """
    word = name.lower().replace("-", "_")
    keys = [key for key in record.model_fields if key != name]
    aliased = [key for key in keys if word in ALIASES.get(key, ())]
    close = difflib.get_close_matches(word, keys, 1) if name not in record.model_fields else []
    return next((f"did you mean '{key}'?" for key in aliased + close), "")


def list_keys(record: type[BaseModel]) -> str:
    """The keys of a record, in its order."""
    return ", ".join(record.model_fields)
