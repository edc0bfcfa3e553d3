"""The public face of dense2moe.

`convert`, `upcycle` and `export` stand beside this folder in a checkout, and in it once installed; both are
`dense2moe.convert` and so on.
"""

from pathlib import Path

if not (Path(__file__).parent / "convert").is_dir():
    __path__.append(str(Path(__file__).parent.parent))  # a checkout, as its files lie
