"""Quality and speed of a bundle, against its LLM alone, its SLM alone and the controls."""
