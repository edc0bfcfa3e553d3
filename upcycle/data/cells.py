"""Cells of tables: columns by name, and texts in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.errors import UpcycleError, shorten


def find_cell(values: Mapping[str, Any], column: str, where: str) -> Any:
    """A row's value in a column.

    Raises:
        UpcycleError: there is no such column.
    """
    if column not in values:
        raise UpcycleError(
            f"{where}: has no column '{column}'; it has {shorten(', '.join(map(str, values)))}; name the column in "
            "data.source"
        )
    return values[column]


def read_text(values: Mapping[str, Any], column: str, where: str) -> str:
    """A row's text in a column.

    Raises:
        UpcycleError: there is no such column, or it holds no text, or none that UTF-8 can write.
    """
    text = find_cell(values, column, where)
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if text is None or text == "" or isinstance(text, str) else f"holds {type(text).__name__}"
        raise UpcycleError(f"{where}: column '{column}' {what}; must be a text")
    check_unicode(text, column, where)
    return text


def check_unicode(text: str, column: str, where: str) -> None:
    """Refuse halves of characters.

    JSON can spell the parts of a surrogate pair, and no file in UTF-8 can hold one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UpcycleError(
            f"{where}: column '{column}' has {half}, half of a character; write the whole one, or leave it out"
        ) from None
