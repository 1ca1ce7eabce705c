"""Training of a pair: the projector and the SLM are trained, the LLM is frozen. Needs torch."""
