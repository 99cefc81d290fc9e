"""Engines for the weight-transfer API of vLLM."""
