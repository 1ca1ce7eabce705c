"""Models from transformers, unmodified, and how a pair of them is composed. Needs torch."""
