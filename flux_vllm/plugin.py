"""The vLLM plugin: makes `--attention-backend flux` known in every process vLLM starts."""

import copyreg

BACKEND_NAME = "FLUX"
BACKEND_PATH = "flux_vllm.attention_backend.backend.FluxBackend"


def register() -> None:
    """Register the backend; vLLM calls this once a process, through the entry point.

    Nothing changes for an engine that uses another attention backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from flux_vllm import compat

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
        copyreg.pickle(AttentionBackendEnum, _reduce)
    compat.install_front_end_hooks()


def _reduce(member: object) -> tuple:
    """Pickle a backend; ours by name, since the reading process may not have loaded plugins.

    `vllm serve` spawns EngineCore and pickles the configuration into it, and an enum member
    normally pickles by a value that is unknown there.
    """
    if member.name == BACKEND_NAME:  # type: ignore[attr-defined]
        return _restore, ()
    return type(member), (member.value,)  # type: ignore[attr-defined]


def _restore() -> object:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[BACKEND_NAME]
