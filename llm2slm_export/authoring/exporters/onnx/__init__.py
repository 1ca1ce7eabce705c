"""torch.export to ONNX, and graph passes."""
