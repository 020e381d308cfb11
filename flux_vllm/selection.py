"""What an operator asks for by `--attention-backend flux`, and whether an engine uses it."""

from typing import Any

BACKEND_NAME = "FLUX"
BACKEND_PATH = "flux_vllm.attention_backend.backend.FluxBackend"


def is_flux(backend: Any) -> bool:
    """Say whether a member of vLLM's enum of attention backends, or None, is ours."""
    return backend is not None and backend.name == BACKEND_NAME


def uses_flux(vllm_config: Any) -> bool:
    """Say whether an engine's attention backend is ours."""
    return is_flux(vllm_config.attention_config.backend)
