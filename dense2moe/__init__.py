"""The public face of dense2moe: version and Python API.

The API is loaded when it is first used. `convert`, `upcycle` and `export` stand beside this folder in a checkout, and
in it once installed; both are `dense2moe.convert` and so on. `dense2moe.upcycle` is that package, and
`dense2moe.api.upcycle` the function.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense2moe.registration import register_when_imported

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from dense2moe.api import Package, check_parity, export_onnx, finetune, quantize, run

    __version__: str

__all__ = ["Package", "__version__", "check_parity", "export_onnx", "finetune", "quantize", "run"]

if not (Path(__file__).parent / "convert").is_dir():
    __path__.append(str(Path(__file__).parent.parent))  # a checkout, as its files lie

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dense2moe")
    if name in __all__:
        from dense2moe import api

        return getattr(api, name)
    raise AttributeError(f"module 'dense2moe' has no attribute '{name}'")
