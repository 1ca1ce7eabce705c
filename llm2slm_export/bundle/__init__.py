"""The bundle: an exported pair on disk. Authoring writes it, inference reads it."""
