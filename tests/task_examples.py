"""Examples of every kind of task, and a file of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dense2moe.export.parity.answers.examples import Answer, MultipleChoice, Similarity

WORDS = (
    "License",
    "work",
    "the terms of",
    "You may",
    "derivative",
    " and conditions",
    "a copy",
    "in whole or in part",
    "Contribution",
)
MARKS = (",", ";", ")")  # a token each, so that none wins by being short
CHOICES = tuple(
    MultipleChoice(
        prompt=f"{WORDS[n % 9]} of {WORDS[(n * 5 + 2) % 9]}",
        choices=MARKS if n % 3 else (" the", " distribution", f" {WORDS[(n + 1) % 9]}."),
        answer=n % 3,
    )
    for n in range(24)
)
ANSWERS = tuple(Answer(prompt=f"{WORDS[n]} {WORDS[n - 1]}", answer=WORDS[n - 2]) for n in range(8))
PAIRS = tuple(Similarity(texts=(WORDS[n % 9], WORDS[(n * n + 1) % 9] + " it"), score=float(n % 4)) for n in range(12))


def write_task(path: Path, examples: Sequence[MultipleChoice | Answer | Similarity | dict[str, Any]]) -> Path:
    lines = [example if isinstance(example, dict) else example.model_dump(mode="json") for example in examples]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
