"""Attention with routes, as a vLLM attention backend."""
