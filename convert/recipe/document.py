"""A YAML file as plain values, with each key's line."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.wording import Key, Mistake, write_key

_MAX_VALUES: Final = 10_000
_MAX_DEPTH: Final = 20

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
    """Gives plain scalars the core schema's types, whatever %YAML directive stands."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node without one.

        `implicit[0]` is true for a plain scalar.
        """
        if kind is ScalarNode and implicit[0]:
            for tag, pattern in _CORE_SCHEMA.items():
                if pattern.match(value):
                    return Tag(suffix=_TAG + tag)
        return super().resolve(kind, value, (False, False))


class YamlDocument:
    """A YAML file as plain values, with lines and mistakes.

    The line of every key, and the mistakes found so far.
    """

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self.mistakes: list[Mistake] = []
        self.lines: dict[Key, int] = {}
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
        mistakes = sorted(dict.fromkeys(self.mistakes), key=lambda mistake: find_line(self.lines, mistake[0]))
        return RecipeError(
            "\n".join(f"{name_line(self.file, self.lines, key)}: {write_key(key)}: {text}" for key, text in mistakes)
        )

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
        """A node's plain values.

        An alias is read again each time it occurs, so values are counted.
        """
        if len(self.lines) > _MAX_VALUES or len(key) > _MAX_DEPTH:
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
        """A node's text, with JSON's halved characters joined.

        JSON escapes a character beyond 16 bits in two halves, which YAML leaves apart.
        """
        text = str(node.value)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            place = f"{self.file}:{_line(node)}"
            raise RecipeError(
                f"{place}: has half a character, {text[:60]!a}; must have both halves, or the character itself"
            ) from error

    def _read_at(self, node: Node, key: Key, named_by: Node) -> object:
        self.lines[key] = _line(named_by)
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


def find_line(lines: Mapping[Key, int], key: Key) -> int:
    """A key's line, or its nearest parent's.

    0 is the file as a whole.
    """
    while key and key not in lines:
        key = key[:-1]
    return lines[key] if key else 0


def name_line(file: Path, lines: Mapping[Key, int], key: Key) -> str:
    """The file with the line of a key, as in `mine.yaml:3`."""
    return f"{file}:{line}" if (line := find_line(lines, key)) else str(file)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
