"""Makes `continuations.jsonl`: six lines of CPython's documentation or source, and which two of eight follow them.

    python recipes/tasks/make_continuations.py

The text is of the test split of `python-docs`, which the embedded model never learned from, and under the PSF's
licence; the wrong ones are of the same domain. Made with Python 3.11.2.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from dense2moe.upcycle.data.held_out import Document
from dense2moe.upcycle.data.python_docs import DOMAINS, read_python_docs

NUM_EXAMPLES = 40  # of each domain
NUM_CHOICES = 4
HEAD, TAIL = 6, 2  # lines


def cut(document: Document) -> Iterator[tuple[str, str]]:
    """Pieces of a document that are neither too short to tell anything nor too long."""
    lines = document.text.splitlines()
    for start in range(0, len(lines) - HEAD - TAIL, HEAD + TAIL):
        head, tail = ("\n".join(lines[a:b]) for a, b in ((start, start + HEAD), (start + HEAD, start + HEAD + TAIL)))
        if 150 < len(head) < 500 and len(tail.strip()) > 30 and len(tail) < 160:
            yield head, "\n" + tail


def main() -> None:
    """Write the file."""
    documents, generator, examples = read_python_docs().documents["test"], random.Random(0), []  # noqa: S311
    for domain in DOMAINS:
        pieces = [piece for document in documents if document.domain == domain for piece in cut(document)]
        tails = sorted({tail for _, tail in pieces})
        for head, tail in generator.sample(pieces, NUM_EXAMPLES):
            choices = [tail, *generator.sample([other for other in tails if other != tail], NUM_CHOICES - 1)]
            generator.shuffle(choices)
            examples.append({"prompt": head, "choices": choices, "answer": choices.index(tail)})
    text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    Path(__file__).with_name("continuations.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
