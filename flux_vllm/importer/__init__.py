"""Imports checkpoints of the published routers: `flux-vllm import`."""
