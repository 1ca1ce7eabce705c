"""Offline jobs: the responses to the rows of a file, in parts, by this process or on Ray."""
