"""From a mixture to a quantized ONNX package that agrees with torch."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
"""onnxruntime 1.29 and later look up names and write a device id below the user's cache directory.

Unless told before their first import.
"""
