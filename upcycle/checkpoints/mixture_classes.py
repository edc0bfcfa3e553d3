"""Classes of our own mixtures, made known to transformers.

A checkpoint of ours names its classes by `auto_map`, for environments without dense2moe. Here they are registered, so
that no code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from dense2moe.upcycle.models import mixture
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.models.host import CLASS_PREFIX, MODEL_TYPE_PREFIX
from dense2moe.upcycle.models.table import find_host


def is_own(model_type: str) -> bool:
    """Whether a model type is one of our own mixtures."""
    return model_type.startswith(MODEL_TYPE_PREFIX) and find_host(model_type) is not None


def find_class(architecture: str) -> Any:
    """The model class of this name: ours, or one of transformers.

    Raises:
        AttributeError: there is none.
    """
    return getattr(mixture if architecture.startswith(CLASS_PREFIX) else transformers, architecture)


@cache
def register_mixture(model_type: str) -> type[PreTrainedConfig]:
    """Make a mixture's model type known to transformers' auto classes.

    Returns its class of configs.
    """
    dense = CONFIG_MAPPING[model_type.removeprefix(MODEL_TYPE_PREFIX)]
    own: type[PreTrainedConfig] = mixture.find_class(CLASS_PREFIX + dense.__name__)
    AutoConfig.register(model_type, own, exist_ok=True)
    for auto_class, model_class in _auto_classes(dense):
        auto_class.register(own, mixture.find_class(CLASS_PREFIX + model_class.__name__), exist_ok=True)
    return own


def map_classes(dense: type[PreTrainedConfig]) -> dict[str, str]:
    """The `auto_map` of the mixtures of a dense family."""
    module = mixture.FILE_NAME.removesuffix(".py")
    named = {"AutoConfig": dense.__name__}
    named |= {auto_class.__name__: model_class.__name__ for auto_class, model_class in _auto_classes(dense)}
    return {auto_class: f"{module}.{CLASS_PREFIX}{name}" for auto_class, name in named.items()}


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A mixture's config as its dense family has it.

    Clients of ONNX know that. The section `mixture` stays, for who asks how many experts there are, and sizes are told
    under the names that most families have too (GPT-2 calls its width `n_embd`). Any other config is returned as it is.
    """
    if not is_own(config.model_type):
        return config
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    made: PreTrainedConfig = CONFIG_MAPPING[config.model_type.removeprefix(MODEL_TYPE_PREFIX)](**fields)
    made.architectures = [name.removeprefix(CLASS_PREFIX) for name in config.architectures or ()]
    return made


def usual_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's sizes under the names that most families have."""
    own = {name: getattr(config, other) for name, other in config.attribute_map.items() if hasattr(config, other)}
    if not hasattr(config, "max_position_embeddings"):
        own["max_position_embeddings"] = find_context(config)
    return own | {name: int(getattr(config, name)) for name in ("num_experts", "num_experts_per_tok")}


def _auto_classes(dense: type[PreTrainedConfig]) -> Iterator[tuple[Any, Any]]:
    """Every auto class that loads a family's models, and what it loads.

    The first class of several, and none of another family: files of Qwen2 may hold a head of JEV's.
    """
    for name in dir(modeling_auto):
        auto_class = getattr(modeling_auto, name)
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and dense in mapping:
            found = mapping[dense]
            model_class = found[0] if isinstance(found, list | tuple) else found
            if model_class.config_class is dense:
                yield auto_class, model_class
