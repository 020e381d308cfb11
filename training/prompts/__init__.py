"""Prompts like those that people send, made offline from real text and code."""
