"""Prompt tuning: learned vectors before the text, kept in peft's format.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2: the vectors are the only
weights that learn. They begin as embeddings of tokens that the vocabulary has (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from dense2moe.upcycle.tasks.task import take_logits

PROMPT_DIRECTORY = "prompt"
PARAMETER = "soft_prompt"
_WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = "prompt_embeddings"


def add_prompt(model: PreTrainedModel, num_tokens: int) -> nn.Parameter:
    """Give the model a parameter of `num_tokens` vectors, [num_tokens, H].

    The embeddings of tokens spread evenly over the vocabulary.
    """
    table: Any = model.get_input_embeddings()
    places = torch.linspace(0, len(table.weight) - 1, num_tokens).long().to(table.weight.device)
    model.register_parameter(PARAMETER, nn.Parameter(table.weight.detach()[places].clone()))
    return get_prompt(model)  # type: ignore[return-value]


def get_prompt(model: Any) -> nn.Parameter | None:
    """The parameter that `add_prompt` gave the model, or None."""
    return getattr(model, PARAMETER, None)


def run_with_prompt(
    call: Any,
    model: Any,
    inputs: Mapping[str, Any],
    prompt: torch.Tensor | None,
    read: Callable[[Any], torch.Tensor] = take_logits,
) -> torch.Tensor:
    """Predictions [B, S, ...] of a model after a learned prompt.

    The prompt is [P, H], or None. `inputs` are what the model is called with, with a prompt ids [B, S] among them;
    `call` is the model itself or what wraps it. `read` takes the predictions from its output. The text is embedded
    inside the model's own call, since FSDP has gathered the embedding only there, and the prompt as well where it is
    the model's parameter.
    """
    if prompt is None:
        return read(call(**inputs))

    def embed(_: nn.Module, __: Any, keywords: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        text = model.get_input_embeddings()(keywords["input_ids"])
        learned = get_prompt(model)
        vectors = (prompt if learned is None else learned).to(text.dtype).expand(len(text), -1, -1)
        others = {name: value for name, value in keywords.items() if name != "input_ids"}
        return (), {"inputs_embeds": torch.cat([vectors, text], dim=1), **others}

    handle = model.register_forward_pre_hook(embed, with_kwargs=True)
    try:
        logits = cast(torch.Tensor, call(**inputs).logits)
    finally:
        handle.remove()
    return logits[:, prompt.shape[0] :]


def write_prompt(prompt: torch.Tensor, model: PreTrainedModel, directory: Path) -> None:
    """Write prompt vectors [P, H] as an adapter that peft loads.

    peft loads it onto the checkpoint in the directory's parent.
    """
    import peft  # slow to import, and only this needs it

    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        inference_mode=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file({_KEY: prompt.detach().cpu().contiguous()}, directory / _WEIGHTS_NAME)


def read_prompt(checkpoint: Path) -> torch.Tensor | None:
    """A checkpoint's prompt vectors [P, H]; None without a prompt."""
    path = checkpoint / PROMPT_DIRECTORY / _WEIGHTS_NAME
    return load_file(path)[_KEY] if path.is_file() else None
