"""The attention backend on NVIDIA GPUs."""
