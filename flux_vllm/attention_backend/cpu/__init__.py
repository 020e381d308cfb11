"""The attention backend on CPUs, over vLLM's own CPU kernels."""
