"""Measure routers and static patterns on held-out prompts."""
