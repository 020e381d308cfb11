"""The sparse patterns, a file each; `flux_vllm.attention_backend.pattern` is their interface."""
