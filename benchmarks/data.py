"""Peak memory of preparing data, in bytes a character.

All of a text, a part of it, and in one list as scripts often do.
    python benchmarks/data.py ../shared/data/wikitext-2/train.txt --repeat 1,4

The text is written `--repeat` times into one file of one document, so that it grows and its words do not. Each
measurement is a process of its own; its peak resident memory is taken less what the same process has once the tokenizer
is loaded and has read a short text. Kept tokens are 4 bytes each, about a byte a character of English; an array that
grows and a file that is written hold them twice.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import DataConfig, TextData

ROOT = Path(__file__).parent.parent
WAYS = ("all", "limit", "list")


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare(model: Path, folder: Path, train: str, limit: int | None) -> None:
    source = TextData(kind="text", train=(train,), validation=("held.txt",), test=("held.txt",))
    output = folder / "out"
    output.mkdir(exist_ok=True)
    prepare_data(
        model, output, DataConfig(source=source, block_size=256, max_train_tokens=limit), folder, lambda *_: None
    )


def measure(way: str, model: Path, folder: Path, limit: int) -> None:
    """Print the bytes that preparing `train.txt` of the folder takes beyond those of preparing `held.txt`."""
    prepare(model, folder, "short.txt", None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = peak_bytes()
    if way == "list":
        ids = list(tokenizer((folder / "train.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"])
        assert ids
    else:
        prepare(model, folder, "train.txt", limit if way == "limit" else None)
    print(peak_bytes() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="a text file in UTF-8")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "recipes" / "models" / "python-docs-4m",
        help="a directory with a tokenizer",
    )
    parser.add_argument("--repeat", default="1,4", help="how often the text is repeated")
    parser.add_argument("--limit", type=int, default=262_144, help="max_train_tokens of 'limit'")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], arguments.model, Path(arguments.measure[1]), arguments.limit)
        return
    text = arguments.text.read_text(encoding="utf-8")
    table = Table(title=f"Peak memory beyond a short text's, {arguments.text.name}")
    for heading in ("characters", *(f"{way}, bytes a character" for way in WAYS), "list over all"):
        table.add_column(heading, justify="right")
    for repeat in map(int, arguments.repeat.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "train.txt").write_text(text * repeat, encoding="utf-8")
            for name in ("short", "held"):
                (folder / f"{name}.txt").write_text(text[:200_000], encoding="utf-8")
            command = [
                sys.executable,
                __file__,
                "--model",
                str(arguments.model),
                "--limit",
                str(arguments.limit),
                "--measure",
            ]
            found = [
                int(subprocess.run([*command, way, scratch], check=True, capture_output=True, text=True).stdout)
                for way in WAYS
            ]
        each = [taken / (len(text) * repeat) for taken in found]
        table.add_row(
            f"{len(text) * repeat:,}", *(f"{value:.2f}" for value in each), f"{each[2] / max(each[0], 1e-9):.1f} ×"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
