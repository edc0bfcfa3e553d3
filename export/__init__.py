"""From a mixture of experts to a quantized ONNX package, shown to agree with torch."""
