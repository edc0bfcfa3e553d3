"""Companions of a checkpoint: files beside the weights, chosen by rule.

A file beside the weights goes along wherever the model goes, unless it is

1. weights or a graph in any format, their index, or an archive;
2. code, which is never run, and so not handed on;
3. a state of training: optimizer, schedule, random numbers, arguments, logs;
4. the model's card, which ours replaces, its pictures, and digests of files. A licence that the card names lies beside
   it, and goes along;
5. `config.json`, which each stage writes for its own model, a description of weights in another format, or a name that
   one of our stages writes;
6. hidden, larger than 100 MB, a link that leads nowhere, or named by characters that cannot be printed.

So licences, notices, use policies, every kind of tokenizer, chat templates and the configs of processors need not be
known. Two kinds of folders are entered: that of additional chat templates, and those of what sentence-transformers puts
behind a model.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.errors import one_line_errors

FOLDER_PATTERNS = ("additional_chat_templates/*.jinja", "[0-9]_*/*.json", "[0-9]_*/*.safetensors")
"""As transformers 5 writes and reads its templates, and sentence-transformers its modules, such as `1_Pooling`."""

_MOST_BYTES = 100_000_000  # three times the largest tokenizer of a public model, Gemma's
_WEIGHTS = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.h5",
    "*.hdf5",
    "*.msgpack",
    "*.ot",
    "*.np[yz]",
    "*.nemo",
    "*.distcp",
    "*.gguf",
    "*.ggml",
    "*.llamafile",
    "*.onnx*",
    "*.ort",
    "*.pb",
    "*.tflite",
    "*.mlmodel",
    "*.engine",
    "openvino*",
    "consolidated*",
    "*.zip",
    "*.tar",
    "*.gz",
    "*.tgz",
    "*.bz2",
    "*.xz",
    "*.zst",
    "*.7z",
    "*.parquet",
    "*.arrow",
)
_CODE = (
    "*.py",
    "*.pyc",
    "*.ipynb",
    "*.sh",
    "*.bat",
    "*.js",
    "*.c",
    "*.cc",
    "*.cpp",
    "*.cu",
    "*.cuh",
    "*.so",
    "*.dll",
    "*.dylib",
    "*.exe",
)
_TRAINING = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "training_args*",
    "trainer_*",
    "*_results.json",
    "events.out.tfevents*",
    "latest",
    "*.log",
)
_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.webm", "*.wav", "*.mp3")
_CARDS = ("readme*", "sha*sums*", "*.sha256", "*.md5")  # digests of the files as they were
_FOREIGN_CONFIGS = (
    "adapter_*",
    "params.json",
    "genai_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)
_OURS = (
    CONFIG_NAME,
    "manifest.json",
    "receipt.json",
    "history.jsonl",
    "stage.json",
    "kept.json",
    "quantization.json",
    "parity.json",
    "report.*",
)
_LEFT = (*_WEIGHTS, *_CODE, *_TRAINING, *_PICTURES, *_CARDS, *_FOREIGN_CONFIGS, *_OURS)

HUB_IGNORED = (
    "*/*",
    ".*",
    *(pattern for pattern in (*_WEIGHTS, *_CODE, *_TRAINING, *_PICTURES) if pattern != "*.index.json"),
)
"""What is never fetched with a model, as the hub's patterns.

Its weights, and what is in folders that are entered, are fetched by their names.
"""


def find_companions(directory: Path) -> tuple[str, ...]:
    """Names of the files that belong to the model, sorted.

    What is in folders comes with its folder's name.

    Raises:
        UpcycleError: the directory cannot be listed.
    """
    with one_line_errors(directory, "cannot be listed", "mend its mode or its disk, or give another directory"):
        paths = [path for path in directory.iterdir() if belongs(path.name)]
        within = [path for pattern in FOLDER_PATTERNS for path in directory.glob(pattern)]
        paths += [path for path in within if path.name.isprintable() and not path.name.startswith(".")]
        found = [path.relative_to(directory).as_posix() for path in paths if _is_small_file(path)]
    return tuple(sorted(found))


def belongs(name: str) -> bool:
    """Whether a small file of this name belongs to a model."""
    folded = name.casefold()
    return (
        not name.startswith(".") and name.isprintable() and not any(fnmatchcase(folded, pattern) for pattern in _LEFT)
    )


def is_training_state(name: str) -> bool:
    """Whether a file of this name is training state, as an optimizer's."""
    return any(fnmatchcase(name.casefold(), pattern) for pattern in _TRAINING)


def _is_small_file(path: Path) -> bool:
    """Whether a path is, or links to, a file smaller than weights."""
    return path.is_file() and path.stat().st_size <= _MOST_BYTES
