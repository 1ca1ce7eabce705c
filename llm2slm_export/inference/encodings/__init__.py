"""Encodings, the projected states of prompts: in memory, in files and in a cache."""
