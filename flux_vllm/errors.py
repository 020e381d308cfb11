"""Errors of Flux-vLLM. Each message names what was expected, what was found and what to do."""


class FluxConfigError(ValueError):
    """A value of `--additional-config '{"flux": ...}'` is unknown, of the wrong type or out of range."""


class RouterCheckpointError(ValueError):
    """A router checkpoint is missing, unreadable, or does not fit the model."""


class UnsupportedConfigurationError(NotImplementedError):
    """The model or a vLLM feature in use cannot be combined with layer routes."""
