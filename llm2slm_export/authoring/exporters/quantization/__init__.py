"""Reduced precision: weights, activations, floats of 16 bits."""
