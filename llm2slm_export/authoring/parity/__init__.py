"""Parity: a bundle's outputs against those of the unmodified models in transformers."""
