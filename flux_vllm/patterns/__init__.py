"""The sparse patterns, a file each; `flux_vllm.patterns.base` is their interface."""
