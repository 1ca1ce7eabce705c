"""Encodings: what encoder and projector make of prompts, in memory, in files and in a cache."""
