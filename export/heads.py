"""Sizes of attention heads, and of their cached keys and values.

`GroupQueryAttention` of onnxruntime takes heads whose size 8 divides. Heads of another size, such as OpenLLaMA 3B's of
100 elements, end in zeros there: a product of queries and keys is the same with them, and what zeros of values add up
to is cut off. So a package's cache is as wide as the padded heads, and whoever allocates it must know their size: it is
`head_dim` in the package's config.json, which optimum reads, and `head_size` in genai_config.json.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig

_MULTIPLE = 8


def head_size(config: PreTrainedConfig) -> int:
    """Elements of a head of queries, keys or values."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def cached_head_size(config: PreTrainedConfig) -> int:
    """Elements of a cached head in a graph of our builder."""
    return -(-head_size(config) // _MULTIPLE) * _MULTIPLE


def describe_cache(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that a package of it needs.

    The size of its heads is that of the cache where these differ.
    """
    if cached_head_size(config) == head_size(config):
        return config
    described = copy.deepcopy(config)
    described.head_dim = cached_head_size(config)
    return described
