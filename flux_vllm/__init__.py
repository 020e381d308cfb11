"""Flux-vLLM: layer routes, FULL or SPARSE attention per request and layer, in stock vLLM."""

__version__ = "0.1.0"
