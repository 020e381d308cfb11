"""The vLLM plugin: makes `--attention-backend flux` known in every process vLLM starts."""

import copyreg
import logging
import re

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.selection import BACKEND_NAME, BACKEND_PATH, is_flux

VLLM_FROM, VLLM_BELOW = (0, 32), (0, 34)
"""The versions whose inside was read: docs/CONTRACTS.md."""

logger = logging.getLogger("vllm.flux")


def register() -> None:
    """Register the backend; vLLM calls this once a process, through the entry point.

    Nothing changes for an engine that uses another attention backend. In a vLLM that is not known,
    or that lacks what is hooked, nothing is registered: a warning says so, and vLLM refuses the
    name `flux` where it is asked for.
    """
    from vllm import __version__ as version

    if not is_known_version(version):
        _warn(
            f"expected vLLM {_dotted(VLLM_FROM)} or later, before {_dotted(VLLM_BELOW)}, found "
            f"{version}; install one of these"
        )
        return
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from flux_vllm.hooks import front_end

        front_end.install()
    except (ImportError, UnsupportedConfigurationError) as error:
        _warn(str(error))
        return
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
        copyreg.pickle(AttentionBackendEnum, _reduce)


def is_known_version(version: str) -> bool:
    """Tell whether this vLLM's inside is known; development builds count as their release."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and VLLM_FROM <= (int(found[1]), int(found[2])) < VLLM_BELOW


def _reduce(member: object) -> tuple:
    """Pickle a backend; ours by name, since the reading process may not have loaded plugins.

    `vllm serve` spawns EngineCore and pickles the configuration into it, and an enum member
    normally pickles by a value that is unknown there.
    """
    if is_flux(member):
        return _restore, ()
    return type(member), (member.value,)  # type: ignore[attr-defined]


def _restore() -> object:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[BACKEND_NAME]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _warn(what: str) -> None:
    logger.warning(
        "flux: %s, or uninstall flux-vllm; `--attention-backend flux` is not available in this "
        "process, and other backends are untouched",
        what,
    )
