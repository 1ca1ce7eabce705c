"""torch.export to ONNX, and the passes over its graphs."""
