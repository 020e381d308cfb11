"""`FluxBackend`, the class that `--attention-backend flux` names: this platform's backend.

vLLM imports the class again by its own module and name, so it is chosen at import.
"""

from vllm.platforms import current_platform

from flux_vllm.errors import UnsupportedConfigurationError

if current_platform.is_cpu():
    from flux_vllm.attention_backend.cpu.backend import FluxCPUBackend as FluxBackend
elif current_platform.is_cuda():
    from flux_vllm.attention_backend.cuda.backend import FluxCUDABackend as FluxBackend
else:
    raise UnsupportedConfigurationError(
        "--attention-backend flux: expected a CPU or a CUDA platform, found "
        f"{current_platform.device_name}; choose another attention backend"
    )

__all__ = ["FluxBackend"]
