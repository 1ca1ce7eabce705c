"""Training a pair: the projector and the SLM learn, the LLM stays frozen. Needs torch."""
