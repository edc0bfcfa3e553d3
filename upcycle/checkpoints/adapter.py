"""A LoRA adapter as peft writes it, laid over its base.

Read in rows, as a checkpoint is: nothing of the size of a matrix is made or held. A changed matrix is, as peft merges
it (tuners/lora/layer.py and variants.py, 0.21),

1. LoRA: W + s B A, where s is alpha / r, or alpha / √r of rank-stabilized LoRA (Kalajdzievski 2023);
2. of an embedding: W + s (B A)ᵀ;
3. DoRA (Liu et al. 2024): m (W + s B A) / |W + s B A|, norms and magnitudes m by row, which is by output;
4. a module that was trained whole (`modules_to_save`): its own weight.

Computed in float32, and rounded once to the dtype of W. r and alpha may be given by module (`rank_pattern`,
`alpha_pattern`). What else peft can write is refused by name: it would be lost.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dense2moe.upcycle.checkpoints.headers import INDEX_NAME, SINGLE_NAME, index_tensors
from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.checkpoints.reader import ADAPTER_CONFIG_NAME, Checkpoint, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES, TensorEntry, chunk_rows, read_rows, read_tensor
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

ADAPTER_STEM = "adapter_model"
_PREFIX = "base_model.model."
_READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights")
_WITHOUT_EFFECT = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # peft itself takes it for false of torch's Linear, which all matrices here are
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
"""Fields that say how it was trained, or what its tensors say as well."""

_WHOLE_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts of A and B that leave the base's weights as they are; PiSSA, OLoRA and others take a part out of them."""

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<kind>lora_A|lora_B)\.weight|(?P<embedding>lora_embedding_[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<base>base_layer)\.weight|(?P<whole>weight|bias))"
)
_MOST_QUANTIFIERS, _MOST_LETTERS = 4, 200  # a pattern with more could be matched for hours


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix.

    `down` is A, `up` is B, `magnitudes` are DoRA's.
    """

    weight: TensorEntry
    down: TensorEntry
    up: TensorEntry
    scale: float
    magnitudes: TensorEntry | None = None
    is_embedding: bool = False

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the changed matrix, in the dtype of its weight."""
        weight = read_rows(self.weight, start, stop)
        down = read_tensor(self.down).to(torch.float32)
        if self.is_embedding:
            change = down[:, start:stop].T @ read_tensor(self.up).to(torch.float32).T
        else:
            change = read_rows(self.up, start, stop).to(torch.float32) @ down
        changed = change.mul_(self.scale).add_(weight.to(torch.float32))
        if self.magnitudes is not None:
            norms = torch.linalg.vector_norm(changed, dim=1)
            changed *= (read_rows(self.magnitudes, start, stop).to(torch.float32) / norms)[:, None]
        return changed.to(weight.dtype)


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter laid over it.

    `changes` are by the names of tensors. Of a changed matrix `entries` say the shape and dtype alone; its values are
    computed when they are read.
    """

    changes: Mapping[str, LowRank] = field(default_factory=dict)

    def is_stored(self, name: str) -> bool:
        """Whether the tensor lies in a file as it is."""
        return name not in self.changes

    @property
    def files(self) -> frozenset[Path]:
        """The files that its tensors lie in, and its changes."""
        parts = [part for change in self.changes.values() for part in (change.down, change.up, change.magnitudes)]
        return super().files | {part.file for part in parts if part is not None}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read or compute some rows of one tensor."""
        change = self.changes.get(name)
        return super().read_rows(name, start, stop) if change is None else change.read_rows(start, stop)

    def read(self, name: str) -> torch.Tensor:
        """Read or compute one tensor."""
        return super().read(name) if self.is_stored(name) else self.read_rows(name, 0, self.entries[name].shape[0])

    def read_chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Read or compute rows of one tensor, chunk by chunk."""
        if self.is_stored(name):
            yield from super().read_chunks(name, start, stop)
        else:
            yield from (self.read_rows(name, *rows) for rows in chunk_rows(self.entries[name], start, stop))


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, and no model beside it."""
    model = any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return (directory / ADAPTER_CONFIG_NAME).is_file() and not model


def open_source(directory: Path, base: Checkpoint) -> Checkpoint:
    """Open a checkpoint, or an adapter of the base laid over it.

    Raises:
        UpcycleError: see `open_checkpoint`; or the adapter is of another kind than LoRA or of another model, or has a
            setting or a tensor that is not known.
    """
    if not is_adapter(directory):
        return open_checkpoint(directory)
    settings = _read_settings(directory / ADAPTER_CONFIG_NAME)
    entries, changes = dict(base.entries), {}
    for module, found in _group(index_tensors(directory, ADAPTER_STEM)).items():
        for kind in ("weight", "bias"):
            if kind in found:
                entry = _take(found.pop(kind), f"{module}.{kind}", base)
                entries[entry.name] = entry
        if found:
            name = f"{module}.weight"
            changes[name] = _make_change(found, name, base, settings)
    return AdaptedCheckpoint(directory, base.config, entries, base.untied, changes)


def open_sources(base: Checkpoint, sources: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """The checkpoints of a base's sources by name, in order; see `open_source`."""
    return {name: open_source(directory, base) for name, directory in sources.items()}


@dataclass(frozen=True)
class _Settings:
    """What an adapter's config says of the size of its changes."""

    file: Path
    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilized: bool
    has_magnitudes: bool

    def scale(self, module: str) -> float:
        """The factor of B A."""
        rank, alpha = self.rank(module), self._find(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def rank(self, module: str) -> int:
        """Rows of A."""
        return int(self._find(self.ranks, module, self.r))

    @staticmethod
    def _find(patterns: Mapping[str, float], module: str, default: float) -> float:
        """As `get_pattern_key` of peft (utils/other.py, 0.21)."""
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _read_settings(file: Path) -> _Settings:
    refuse_pointer(file)
    with one_line_errors(file, "not valid JSON", "restore the file"):
        raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else None
        raise UpcycleError(f"{file}: peft_type is {shorten(found)}; must be LORA; {_REMEDY}")
    for name, value in raw.items():
        is_known = name in _READ or name in _WITHOUT_EFFECT
        if not is_known and value not in (None, False, "none") and value != {} and value != []:
            raise UpcycleError(f"{file}: {shorten(name)} is {shorten(value)}, which is not known here; {_REMEDY}")
    if raw.get("init_lora_weights", True) not in _WHOLE_STARTS:
        raise UpcycleError(
            f"{file}: init_lora_weights is {shorten(raw['init_lora_weights'])}, which takes a part out of the base's "
            f"weights; {_REMEDY}"
        )
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    for name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
            raise UpcycleError(f"{file}: {name} is {shorten(values)}; must be a mapping of modules to positive numbers")
        for pattern in values:
            _refuse_intricate(pattern, f"{file}: {name}")
    for name in ("r", "lora_alpha"):
        if not _is_number(raw.get(name, 8)):
            raise UpcycleError(f"{file}: {name} is {shorten(raw[name])}; must be a positive number")
    stabilized, magnitudes = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
    return _Settings(file, raw.get("r", 8), raw.get("lora_alpha", 8), ranks, alphas, stabilized, magnitudes)


_REMEDY = (
    "merge it by peft's PeftModel.from_pretrained(model, adapter).merge_and_unload(), write the result with "
    "save_pretrained(), and give that"
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _refuse_intricate(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, or could be matched for hours."""
    if (
        len(pattern) > _MOST_LETTERS
        or re.search(r"\)[*+?{]", pattern)
        or len(re.findall(r"[*+{]", pattern)) > (_MOST_QUANTIFIERS)
    ):
        raise UpcycleError(f"{where}: '{shorten(pattern)}' is too intricate a pattern; name modules; {_REMEDY}")
    with one_line_errors(Path(where), f"'{shorten(pattern)}' is no pattern", "restore the file"):
        re.compile(pattern)


def _group(stored: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each module, by their kinds."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in stored.items():
        found = _KEY.fullmatch(name.removeprefix(_PREFIX))
        if found is None or not name.startswith(_PREFIX):
            raise UpcycleError(f"{entry.file}: tensor '{name}' is none that peft's LoRA has; {_REMEDY}")
        kind = next(value for key, value in found.groupdict().items() if key != "module" and value is not None)
        modules.setdefault(found["module"], {})[kind] = entry
    return modules


def _take(entry: TensorEntry, name: str, base: Checkpoint) -> TensorEntry:
    """A tensor in the place of the base's, under its name."""
    _refuse_foreign(entry, name, base)
    if entry.shape != base.entries[name].shape:
        raise UpcycleError(
            f"{entry.file}: tensor '{entry.name}' has shape {list(entry.shape)}; the base's has "
            f"{list(base.entries[name].shape)}; an adapter must be of its base, without added tokens"
        )
    if entry.dtype not in DTYPES:
        raise UpcycleError(
            f"{entry.file}: tensor '{entry.name}' is stored as {entry.dtype}; it must be one of {', '.join(DTYPES)}"
        )
    return replace(entry, name=name)


def _refuse_foreign(entry: TensorEntry, name: str, base: Checkpoint) -> None:
    """Refuse what the base has no place for, or uses twice."""
    if name not in base.entries:
        raise UpcycleError(
            f"{entry.file}: tensor '{entry.name}' changes '{name}', which the base {base.directory} does not have; an "
            "adapter must be of its base"
        )
    tied = getattr(base.config, "tie_word_embeddings", False)
    if tied and len(base.entries[name].shape) == 2 and ".layers." not in name and ".block." not in name:
        raise UpcycleError(
            f"{entry.file}: tensor '{entry.name}' changes the embedding, which is the base's head as well; peft trains "
            f"one of them alone; {_REMEDY}"
        )


def _make_change(found: dict[str, TensorEntry], name: str, base: Checkpoint, settings: _Settings) -> LowRank:
    """The change of one matrix, held against base and settings."""
    first = next(iter(found.values()))
    _refuse_foreign(first, name, base)
    module, entry = name.removesuffix(".weight"), base.entries[name]
    is_embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    wanted = {*names, *(("lora_magnitude_vector",) if settings.has_magnitudes else ())}
    if found.keys() - {"base_layer"} != wanted:
        raise UpcycleError(
            f"{first.file}: of module '{module}' it has {', '.join(sorted(found))}; by {ADAPTER_CONFIG_NAME} it must "
            f"have {', '.join(sorted(wanted))}; download the adapter again"
        )
    if is_embedding and settings.has_magnitudes:
        raise UpcycleError(
            f"{settings.file}: use_dora is true, and '{module}' is an embedding, whose norms are by column; {_REMEDY}"
        )
    weight = _take(found["base_layer"], name, base) if "base_layer" in found else entry
    down, up = (found[each] for each in names)
    rank, (rows, columns) = settings.rank(module), entry.shape
    outer, inner = (columns, rows) if is_embedding else (rows, columns)
    shapes: dict[TensorEntry, tuple[int, ...]] = {down: (rank, inner), up: (outer, rank)}
    if (magnitudes := found.get("lora_magnitude_vector")) is not None:
        shapes[magnitudes] = (rows,)
    for each, shape in shapes.items():
        if each.shape != shape or each.dtype not in DTYPES:
            raise UpcycleError(
                f"{each.file}: tensor '{each.name}' is {each.dtype} of shape {list(each.shape)}; by the base and "
                f"{ADAPTER_CONFIG_NAME} it must be a float of shape {list(shape)}"
            )
    return LowRank(weight, down, up, settings.scale(module), magnitudes, is_embedding)
