"""Answers with labels: what a model says, and what is right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelAnswer:
    """What a model says of an example, and what is right.

    Numbers of labels: one of a text or an image, one a word of a text whose words have labels, those that hold where
    several may; or values, where a text has a score. part: the number of its task, of several at once.
    """

    said: tuple[float, ...]
    right: tuple[float, ...]
    part: int = 0
