"""attnx in libraries of models; each integration needs its library installed."""
