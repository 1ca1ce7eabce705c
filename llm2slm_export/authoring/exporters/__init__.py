"""Export of graphs to files: ONNX with torch's dynamo exporter, quantization, and TensorRT engines."""
