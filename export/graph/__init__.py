"""ONNX graphs of decoders, built from the tensors of a checkpoint."""
