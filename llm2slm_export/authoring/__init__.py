"""Authoring: pairs are composed, trained, exported and compared with transformers. It needs torch."""
