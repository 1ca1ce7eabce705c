"""The backends that run a bundle's graphs, one per runtime, and their protocol."""
