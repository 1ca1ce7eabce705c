"""Reduced precision: weight-only quantization, static int8, and 16-bit floats."""
