"""Changes of a tree of values: what JSON and YAML hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

Place = tuple[Any, Any]
"""A list or mapping, and the index or key of one of its values."""

_DEEP = 200
_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    5,
    7,
    1000,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    0.5,
    -0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
)
_TEXTS = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "null",
    "true",
    "nan",
    "[/INST]",
    "[red]red[/red]",
    "<script>alert(1)</script>",
    "{{ 1/0 }}",
    "${HOME}",
    "%s%d%n",
    "\\",
    "'\"",
    "`",
    "\x1b[31mred\x1b[0m",
    "\r\n",
    "two\nlines",
    "\x00",
    "\x07",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ud83d",
    "\ud83d\ude00",
    "\U0001f600",
    "é",
    "ｆｕｌｌ",
    "../..",
    "/",
    "~",
    "~nobody",
    "*",
    "**",
    "[a-",
    "con",
    "file:///etc/passwd",
    "a" * 300,
    "a" * 5000,
    "1e999",
    "0x10",
    "llama",
    "LlamaForCausalLM",
    "float8_e4m3fn",
    "bfloat16",
)
_EMPTY: tuple[Any, ...] = ([], {}, [[]], [None], {"": None}, {"x": {}}, [0] * 64, ["x", 1, None])


def odd_value(random: Random) -> Any:
    """A value that the one who wrote a reader may not have thought of."""
    match random.randrange(8):
        case 0 | 1:
            return random.choice(_NUMBERS)
        case 2 | 3 | 4:
            return random.choice(_TEXTS)
        case 5:
            return random.choice((None, True, False))
        case 6:
            return copy.deepcopy(random.choice(_EMPTY))
        case _:
            return _nest(random.choice((0, "x", None)), random.choice((2, 25, _DEEP)), random.random() < 0.5)


def _nest(value: Any, depth: int, in_lists: bool) -> Any:
    for _ in range(depth):
        value = [value] if in_lists else {"x": value}
    return value


# Trees of values.


def _choose_place(tree: Any, random: Random) -> Place:
    """A value of a tree: each level is as likely as the next, so that a vocabulary does not outweigh all else."""
    place: Place | None = None
    while isinstance(tree, dict | list) and tree and (place is None or random.random() < 0.6):
        key = random.choice(list(tree)) if isinstance(tree, dict) else random.randrange(len(tree))
        place, tree = (tree, key), tree[key]
    assert place is not None
    return place


def _set(place: Place, random: Random) -> None:
    parent, key = place
    parent[key] = odd_value(random)


def _drop(place: Place, random: Random) -> None:
    parent, key = place
    del parent[key]


def _rename(place: Place, random: Random) -> None:
    parent, key = place
    value = parent.pop(key)
    if isinstance(parent, dict):
        parent[random.choice([*_TEXTS, f"{key}_", str(key).upper(), str(key)[:-1]])] = value
    else:
        parent.insert(random.randrange(len(parent) + 1), value)


def _add(place: Place, random: Random) -> None:
    parent, key = place
    if isinstance(parent, dict):
        parent[random.choice((*_TEXTS, *_WELL_KNOWN, *_WELL_KNOWN))] = odd_value(random)
    else:
        parent.insert(key, odd_value(random))


def _swap(place: Place, random: Random) -> None:
    parent, key = place
    other = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def _wrap(place: Place, random: Random) -> None:
    parent, key = place
    parent[key] = random.choice(
        (lambda value: [value], lambda value: {"x": value}, str, lambda value: [value, copy.deepcopy(value)])
    )(parent[key])


def _nudge(place: Place, random: Random) -> None:
    """A number that is nearly right, a text that is."""
    parent, key = place
    value = parent[key]
    match value:
        case bool():
            parent[key] = not value
        case int():
            whole = (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, value * 10**7)
            parent[key] = random.choice((*whole, float(value), value + 0.5, str(value)))
        case float():
            parent[key] = random.choice((-value, value * 2, value * 1e6, value * 1e-6, 0.0, str(value)))
        case str():
            at = random.randrange(len(value) + 1)
            parent[key] = random.choice(
                (value[:at], value[:at] + random.choice(_TEXTS) + value[at:], value.upper(), value * 2, f" {value}")
            )
        case list():
            parent[key] = random.choice((value * 2, value[:-1], value[::-1], value[:1] * len(value)))
        case dict():
            parent[key] = random.choice((list(value), list(value.values()), {}, str(value)))
        case _:
            parent[key] = odd_value(random)


_WELL_KNOWN = (
    "sliding_window",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "quantization_config",
    "auto_map",
    "layer_types",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "torch_dtype",
    "dtype",
    "vocab_size",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "pretraining_tp",
    "architectures",
    "model_type",
    "text_config",
    "hidden_act",
    "added_tokens_decoder",
    "chat_template",
    "tokenizer_class",
    "model_max_length",
    "extra_special_tokens",
    "temperature",
    "top_k",
    "do_sample",
    "max_length",
    "stop_strings",
    "__class__",
    "x",
)
TREES: dict[str, Callable[[Place, Random], None]] = {
    "set": _set,
    "drop": _drop,
    "rename": _rename,
    "add": _add,
    "swap": _swap,
    "wrap": _wrap,
    "nudge": _nudge,
}


def change_tree(tree: Any, what: str, random: Random) -> None:
    """Do one of `TREES` at one place, seldom at more."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if tree:
            TREES[what](_choose_place(tree, random), random)
