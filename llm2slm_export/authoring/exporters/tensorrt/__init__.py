"""Compilation of ONNX graphs to TensorRT engines."""
