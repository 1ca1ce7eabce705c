"""Unmodified transformers models, and their composition into a pair. Needs torch."""
