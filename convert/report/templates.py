"""The templates of pages and cards, and how they are read."""

from __future__ import annotations

from importlib.resources import files

import jinja2


def load_template(name: str) -> jinja2.Template:
    """A template of this package; HTML is escaped, undefined names are errors."""
    environment = jinja2.Environment(
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read),
    )
    return environment.get_template(name)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
