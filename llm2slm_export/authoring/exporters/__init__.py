"""Graphs to files: ONNX with torch's dynamo exporter, weight-only quantisation, and weights stored once."""
