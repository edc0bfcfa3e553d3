"""The recipe: one YAML file that drives the whole conversion."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, ValidationError, field_validator, model_validator
from pydantic import Tag as Branch
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from dense2moe.convert.errors import RecipeError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.variant import CUDA_BLOCKS, QUANTIZED, STATIC, Variant
from dense2moe.upcycle.building.config import BIASED_TARGETS, UpcycleConfig
from dense2moe.upcycle.data.config import DataConfig, count_domains
from dense2moe.upcycle.record import Record, named_value
from dense2moe.upcycle.training.config import FinetuneConfig

_MAX_BYTES: Final = 100_000
_MAX_VALUES: Final = 10_000
_MAX_DEPTH: Final = 20

HUB_ID: Final = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$"

Key = tuple[str | int, ...]
Mistake = tuple[Key, str]


class LocalSource(Record):
    """A dense checkpoint in a local directory."""

    path: str = Field(
        min_length=1, description="Directory of the checkpoint, beside the recipe or below the current directory."
    )


class HubSource(Record):
    """A dense checkpoint of the Hugging Face hub."""

    hub: str = Field(pattern=HUB_ID, description="Model id, such as 'HuggingFaceTB/SmolLM2-135M'.")
    revision: str = Field("main", min_length=1, description="Commit, tag or branch; a commit makes the run repeatable.")


def _from_shorthand(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _source_tag(value: object) -> str | None:
    keys = type(value).model_fields if isinstance(value, Record) else value if isinstance(value, dict) else ()
    tags = [tag for tag in ("path", "hub") if tag in keys]
    return tags[0] if len(tags) == 1 else None


Source = Annotated[
    Annotated[LocalSource, Branch("path")] | Annotated[HubSource, Branch("hub")],
    Discriminator(_source_tag),
    BeforeValidator(
        _from_shorthand, json_schema_input_type=Annotated[str, Field(min_length=1)] | LocalSource | HubSource
    ),
]


class Recipe(Record):
    """What to convert, on which text, and with which settings."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="Name of the run and of its directory; the file's name without it.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random choice.")
    source: Source = Field(
        description="The dense checkpoint: a local directory, or an id of the Hugging Face hub with its revision."
    )
    data: DataConfig = Field(description="The text that the model is fine-tuned and measured on.")
    upcycle: UpcycleConfig = Field(UpcycleConfig(), description="How the dense model becomes a mixture of experts.")
    finetune: FinetuneConfig | None = Field(
        FinetuneConfig(),
        description="How the mixture of experts is trained; null switches it off, and the upcycled model is exported "
        "as it is.",
    )
    variants: Annotated[tuple[Variant, ...], Field(strict=False)] = Field(
        ("float32", "int8", "int4"),
        min_length=1,
        description="Precisions of the ONNX models, each made and measured.",
        json_schema_extra={"uniqueItems": True},
    )
    quantize: QuantizeConfig = Field(
        QuantizeConfig(), description="How the int8, int8-qdq, int4 and mixed variants are quantized."
    )
    export: OnnxConfig = Field(OnnxConfig(), description="How the ONNX graph is built.")
    parity: ParityConfig = Field(
        ParityConfig(), description="How closely each ONNX model must agree with the torch model."
    )

    @property
    def training_stages(self) -> tuple[FinetuneConfig, ...]:
        """Every stage of fine-tuning with all of its settings; none where it is switched off."""
        return self.finetune.resolve_stages() if self.finetune else ()

    @field_validator("variants")
    @classmethod
    def _check_unique(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if twice := [variant for variant in dict.fromkeys(variants) if variants.count(variant) > 1]:
            raise ValueError(f"has {_either(twice, 'and')} more than once; must have each once")
        return variants

    @model_validator(mode="after")
    def _check_across_records(self) -> Recipe:
        if mistakes := _contradictions(self):
            raise _ContradictionError(mistakes)
        return self


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its name, and the file and text that it was read from."""

    recipe: Recipe
    name: str
    path: Path
    text: str


class _ContradictionError(ValueError):
    """Mistakes that only several records together show."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("; ".join(f"{_dotted(key)}: {text}" for key, text in mistakes))
        self.mistakes = mistakes


def _contradictions(recipe: Recipe) -> list[Mistake]:
    mistakes: list[Mistake] = []
    block_size, named_size = recipe.data.block_size, named_value(recipe.data, "block_size")
    for field in ("max_train_tokens", "max_validation_tokens", "max_test_tokens"):
        tokens = getattr(recipe.data, field)
        if tokens is not None and tokens < block_size:
            text = (
                f"is {named_value(recipe.data, field)}; must be at least data.block_size, which is {named_size}, "
                "to hold one block"
            )
            mistakes.append((("data", field), text))
    if recipe.parity.decode_steps >= block_size:
        steps = named_value(recipe.parity, "decode_steps")
        mistakes.append(
            (
                ("parity", "decode_steps"),
                f"is {steps}; must be less than data.block_size, which is {named_size}, to leave a prompt",
            )
        )
    if missing := [variant for variant in recipe.variants if variant not in recipe.parity.max_perplexity_increase]:
        mistakes.append(
            (
                ("parity", "max_perplexity_increase"),
                f"lacks {_either(missing, 'and')}; must have a limit for each of the variants",
            )
        )
    if STATIC in recipe.variants and recipe.export.device == "cuda":
        mistakes.append(
            (
                ("variants",),
                f"has '{STATIC}', whose products CUDA computes as floats; leave it out, or set export.device to 'cpu'",
            )
        )
    quantized = [variant for variant in recipe.variants if variant in QUANTIZED and variant != STATIC]
    limits = [name for name in ("budget", "max_perplexity_increase") if getattr(recipe.quantize, name) is not None]
    if len(limits) > 1:
        mistakes.append((("quantize", limits[1]), "is given beside budget; must be one of them"))
    if limits and "mixed" not in recipe.variants:
        mistakes.append(
            (
                ("quantize", limits[0]),
                "is given for variant 'mixed', which variants lacks; add 'mixed' to variants, or leave it out",
            )
        )
    if recipe.quantize.budget is not None and recipe.export.lowering == "switched":
        mistakes.append(
            (
                ("export", "lowering"),
                "is 'switched', which writes experts twice; quantize.budget, which counts them once, needs another",
            )
        )
    if "mixed" in recipe.variants and not limits:
        mistakes.append(
            (
                ("variants",),
                "has 'mixed'; quantize must have a budget, or a max_perplexity_increase, to choose its bits by",
            )
        )
    if (
        quantized
        and recipe.export.device == "cuda"
        and recipe.export.lowering == "auto"
        and recipe.quantize.block_size not in CUDA_BLOCKS
    ):
        blocks = " or ".join(map(str, CUDA_BLOCKS))
        text = (
            f"is 'cuda'; quantize.block_size, which is {recipe.quantize.block_size}, must be {blocks} for its "
            "QMoE operator"
        )
        mistakes.append((("export", "device"), f"{text}; or name another export.lowering"))
    rate = recipe.finetune.bias_update_rate if recipe.finetune else None
    if rate and recipe.upcycle.target not in BIASED_TARGETS:
        targets = _either(BIASED_TARGETS)
        text = (
            f"is {rate:g}; must be left out, or upcycle.target be {targets}: the gates of "
            f"'{recipe.upcycle.target}' have no selection bias"
        )
        mistakes.append((("finetune", "bias_update_rate"), text))
    num_domains, num_rows = count_domains(recipe.data.source), recipe.upcycle.num_router_rows
    for number, stage in enumerate(recipe.training_stages):
        if stage.routing == "by-domain" and (num_domains < 2 or num_rows % num_domains):
            key: Key = (
                ("finetune", "stages", number, "routing")
                if recipe.finetune and recipe.finetune.stages
                else ("finetune", "routing")
            )
            experts = "groups of granular experts" if recipe.upcycle.group_size > 1 else "experts"
            text = (
                f"is 'by-domain'; the domains, of which the data has {num_domains}, must be 2 or more and divide "
                f"the {num_rows} {experts} evenly"
            )
            mistakes.append((key, text))
    return mistakes


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: with one line `FILE:LINE: KEY: what is; what must be` for each mistake in the file.
    """
    text = _read_text(path)
    document = _Document(path, text)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        document.mistakes += [mistake for details in error.errors() for mistake in _explain(details)]
    if document.mistakes:
        raise document.refusal()
    return LoadedRecipe(recipe, recipe.name or path.stem, path, text)


def resolve_path(path: str, recipe_path: Path) -> Path:
    """The file or directory that `path` in a recipe means.

    Beside the recipe, or else below the current directory; `~` is the home.

    Raises:
        RecipeError: there is none.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{recipe_path}: '{path}' names no home directory; give the path in full") from error
    tried = list(dict.fromkeys(base / given for base in (recipe_path.absolute().parent, Path.cwd())))
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise RecipeError(
        f"{recipe_path}: '{path}' is not there; looked for {' and '.join(map(str, tried))}; correct the path"
    )


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors: a recipe's first line may be `# yaml-language-server: $schema=FILE`."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Recipe.model_json_schema() | {"title": "Recipe of dense2moe"}


# Reading YAML

# The core schema (YAML 1.2.2, section 10.3.2). ruamel's own rules add dates and 1_000 to it, and miss .5e3. Here `on`
# and `yes` are strings.
_TAG: Final = "tag:yaml.org,2002:"
_CORE_SCHEMA: Final = {
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"([-+]?[0-9]{1,99}|0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99})\Z"),
    "float": re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
}


class _CoreResolver(VersionedResolver):
    """Gives plain scalars the core schema's types, whatever a %YAML directive says."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node that has none in the file; `implicit[0]` is true of a plain scalar."""
        if kind is ScalarNode and implicit[0]:
            for tag, pattern in _CORE_SCHEMA.items():
                if pattern.match(value):
                    return Tag(suffix=_TAG + tag)
        return super().resolve(kind, value, (False, False))


class _Document:
    """A YAML file as plain values, with the line of every key and the mistakes found so far."""

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self.mistakes: list[Mistake] = []
        self._lines: dict[Key, int] = {}
        root = self._compose(text)
        if root is None or (isinstance(root, ScalarNode) and root.value == ""):
            raise RecipeError(f"{file}: is empty; must have the keys source and data")
        if not isinstance(root, MappingNode):
            found = "a list" if isinstance(root, SequenceNode) else "a single value"
            raise RecipeError(
                f"{file}:{_line(root)}: is {found} at the top level; must be a mapping with the keys source and data"
            )
        self.values = self._read(root, ())

    def refusal(self) -> RecipeError:
        """All mistakes, one a line, in the order of the file."""
        mistakes = sorted(dict.fromkeys(self.mistakes), key=lambda mistake: self._line_of(mistake[0]))
        return RecipeError("\n".join(f"{self._place(key)}: {_dotted(key)}: {text}" for key, text in mistakes))

    def _place(self, key: Key) -> str:
        return f"{self.file}:{line}" if (line := self._line_of(key)) else str(self.file)

    def _line_of(self, key: Key) -> int:
        """Line of a key, or of the nearest one around it; 0 is the file as a whole."""
        while key and key not in self._lines:
            key = key[:-1]
        return self._lines[key] if key else 0

    def _compose(self, text: str) -> Node | None:
        yaml = YAML(typ="safe", pure=True)
        yaml.version = (1, 2)
        yaml.max_depth = _MAX_DEPTH
        yaml.Resolver = _CoreResolver
        yaml.composer.warn_double_anchors = False  # YAML allows them
        try:
            node: Node | None = yaml.compose(text)
        except MaxDepthExceededError as error:
            raise self._too_large() from error
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = " ".join(", ".join(part for part in (error.context, error.problem) if part).split())
            raise RecipeError(
                f"{self.file}:{mark.line + 1}: column {mark.column + 1}: is not YAML: {problem}"
            ) from error
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise RecipeError(
                f"{self.file}:{line}: has the character {error.character:#x}; YAML allows no such character"
            ) from error
        return node

    def _too_large(self) -> RecipeError:
        return RecipeError(
            f"{self.file}: has more than {_MAX_VALUES} values or {_MAX_DEPTH} levels, aliases counted; must be a "
            "smaller recipe"
        )

    def _read(self, node: Node, key: Key) -> object:
        """Plain values of a node; an alias is read again each time it occurs, so values are counted."""
        if len(self._lines) > _MAX_VALUES or len(key) > _MAX_DEPTH:
            raise self._too_large()
        tag = str(node.tag).removeprefix(_TAG)
        if isinstance(node, SequenceNode) and tag == "seq":
            return [self._read_at(child, (*key, index), child) for index, child in enumerate(node.value)]
        if isinstance(node, MappingNode) and tag == "map":
            values: dict[str, object] = {}
            for name, child in node.value:
                if not isinstance(name, ScalarNode) or name.value == "":
                    raise RecipeError(f"{self.file}:{_line(name)}: has a key that is no word; must have words for keys")
                word = self._join_halves(name)
                if word in values:
                    self.mistakes.append(((*key, word), f"is given again at line {_line(name)}; must be given once"))
                else:
                    values[word] = self._read_at(child, (*key, word), name)
            return values
        if isinstance(node, ScalarNode) and (
            tag == "str" or (tag in _CORE_SCHEMA and _CORE_SCHEMA[tag].match(node.value))
        ):
            return self._convert(self._join_halves(node), tag, key)
        raise RecipeError(
            f"{self.file}:{_line(node)}: has the tag {reprlib.repr(str(node.tag))}, which does not fit; remove the tag"
        )

    def _join_halves(self, node: ScalarNode) -> str:
        """Text of a node; JSON escapes a character beyond 16 bits in two halves, which YAML leaves apart."""
        text = str(node.value)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            place = f"{self.file}:{_line(node)}"
            raise RecipeError(
                f"{place}: has half a character, {text[:60]!a}; must have both halves, or the character itself"
            ) from error

    def _read_at(self, node: Node, key: Key, named_by: Node) -> object:
        self._lines[key] = _line(named_by)
        return self._read(node, key)

    def _convert(self, text: str, tag: str, key: Key) -> object:
        match tag:
            case "null":
                return None
            case "bool":
                return text[0] in "tT"
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "float":
                number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                if not math.isfinite(number):
                    self.mistakes.append((key, f"is {number}; must be finite"))
                return number
            case _:
                return text


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe") from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {_MAX_BYTES} bytes; must be a recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 (byte {raw[error.start]:#04x}); save it as UTF-8") from error


# Explaining what pydantic refuses

_MUST_BE: Final = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "finite",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "a string of at least {min_length} character",
    "too_short": "a list of at least {min_length} item",
}

# Words for a key that other tools use, and that are not spelled like it.
_ALIASES: Final[dict[str, tuple[str, ...]]] = {
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


def _explain(error: ErrorDetails) -> list[Mistake]:
    """One of pydantic's errors in our words, under the key that the file has."""
    ctx, given = error.get("ctx", {}), error["input"]
    key, parent, records = _locate(error["loc"])
    match error["type"]:
        case "value_error" if isinstance(ctx["error"], _ContradictionError):
            return ctx["error"].mistakes
        case "value_error":
            text = str(ctx["error"])
        case "extra_forbidden":
            assert parent is not None
            text = f"unknown key; {_suggestion(str(key[-1]), parent) or f'the keys here are {_listed(parent)}'}"
        case "missing":
            assert parent is not None
            text = (
                "missing; must be "
                f"{_mapping(records) if records else f'given: {parent.model_fields[str(key[-1])].description}'}"
            )
        case "union_tag_invalid" | "union_tag_not_found" if (
            isinstance(given, dict) and "kind" in records[0].model_fields
        ):
            key = (*key, "kind")
            found = f"is {_shown(given['kind'])}" if "kind" in given else "missing"
            text = f"{found}; must be {_either(map(_record_tag, records))}"
        case "union_tag_not_found" if isinstance(given, dict):
            text = (
                f"has {'both' if 'hub' in given else 'neither'} path {'and' if 'hub' in given else 'nor'} hub; "
                "must have one of them"
            )
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            suggestion = _suggestion(str(key[-1]), parent) if parent else ""
            text = f"is {_typed(given)}; must be {_mapping(records)}" + (f"; {suggestion}" if suggestion else "")
        case _ if error["loc"][-1] == "[key]":
            text = f"unknown key; must be {ctx['expected']}"
        case "too_short" if len(given) >= ctx["min_length"]:
            return []  # its items are refused one by one
        case "too_short" if isinstance(given, dict):
            text = f"has {len(given)} key{'' if len(given) == 1 else 's'}; must have at least {ctx['min_length']}"
        case _ if isinstance(given, float) and not math.isfinite(given):
            return []  # refused when it was read
        case kind if kind in _MUST_BE:
            text = (
                f"is {_typed(given) if kind.endswith('_type') else _shown(given)}; must be "
                f"{_MUST_BE[kind].format(**ctx)}"
            )
        case _:
            text = f"is {_shown(given)}; {error['msg']}"
    return [(key, text)]


def _locate(loc: tuple[int | str, ...]) -> tuple[Key, type[BaseModel] | None, tuple[type[BaseModel], ...]]:
    """The key in the file that pydantic's location means, the record that holds it.

    And the records that may be its value.
    """
    key: Key = ()
    parent: type[BaseModel] | None = None
    records: tuple[type[BaseModel], ...] = (Recipe,)
    named = False  # by the recipe itself, as domains are
    for part in loc:
        if named:
            key, parent, named = (*key, part), None, False
        elif len(records) > 1:  # the tag of a union's branch, which no file has
            records = tuple(record for record in records if part == _record_tag(record))
        elif isinstance(part, int):  # an item of a list, whose record is the list's
            key = (*key, part)
        elif part != "[key]":
            parent = records[0] if records else None
            field = parent.model_fields.get(str(part)) if parent else None
            key, records = (*key, part), _records(field.annotation) if field else ()
            named = bool(records) and field is not None and get_origin(field.annotation) is dict
    return key, parent, records


def _records(annotation: Any) -> tuple[type[BaseModel], ...]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(record for part in get_args(annotation) for record in _records(part))


def _record_tag(record: type[BaseModel]) -> str:
    """A record in a union is known by its literal `kind`, or else by its first key."""
    kind = record.model_fields.get("kind")
    return str(get_args(kind.annotation)[0]) if kind else next(iter(record.model_fields))


def _mapping(records: tuple[type[BaseModel], ...]) -> str:
    if len(records) == 1:
        return f"a mapping of the keys {_listed(records[0])}"
    tags = _either(map(_record_tag, records))
    return (
        f"a mapping whose kind is {tags}"
        if "kind" in records[0].model_fields
        else f"a directory, or a mapping with {tags}"
    )


def _suggestion(name: str, record: type[BaseModel]) -> str:
    """The key of the record that was probably meant, as a question; nothing if none is near."""
    word = name.lower().replace("-", "_")
    keys = [key for key in record.model_fields if key != name]
    aliased = [key for key in keys if word in _ALIASES.get(key, ())]
    close = difflib.get_close_matches(word, keys, 1) if name not in record.model_fields else []
    return next((f"did you mean '{key}'?" for key in aliased + close), "")


def _listed(record: type[BaseModel]) -> str:
    return ", ".join(record.model_fields)


def _either(words: Iterable[str], conjunction: str = "or") -> str:
    *rest, last = [f"'{word}'" for word in words]
    return f"{', '.join(rest)} {conjunction} {last}" if rest else last


def _dotted(key: Key) -> str:
    """A key as people write it: `data.source.train[0]`."""
    words = (
        part if isinstance(part, int) or re.fullmatch(r"[\w-]{1,60}", part) else reprlib.repr(part) for part in key
    )
    parts = (f"[{word}]" if isinstance(word, int) else f".{word}" for word in words)
    return "".join(parts).removeprefix(".") or "recipe"


def _shown(value: object) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "a list" if value else "an empty list"
        case dict():
            return "a mapping"
        case _:
            return reprlib.repr(value)


def _typed(value: object) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return f"{_shown(value)} ({kinds[type(value)]})" if type(value) in kinds else _shown(value)
