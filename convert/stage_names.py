"""Names of the pipeline's stages, in order."""

from typing import Literal, get_args

StageName = Literal["source", "data", "branch", "upcycle", "finetune", "quantize", "onnx", "parity", "report"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
