"""The bundle: an exported pair on disk. Authoring writes it and inference reads it."""
