"""Inference: an exported pair is opened and generates. NumPy and a runtime, never torch."""
