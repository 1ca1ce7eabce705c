"""Quality and speed of a bundle, compared with its LLM alone, its SLM alone and controls."""
