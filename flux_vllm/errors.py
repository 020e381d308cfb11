"""Errors of Flux-vLLM. Each message names what was expected, what was found and what to do."""


class FluxConfigError(ValueError):
    """The operator's configuration has an unknown key, a wrong type or a value out of range."""


class RouterCheckpointError(ValueError):
    """A router checkpoint is missing, unreadable, or does not fit the model."""


class CheckpointImportError(ValueError):
    """A published checkpoint is unreadable, or cannot be served as its authors compute it."""


class UnsupportedConfigurationError(NotImplementedError):
    """The model or a vLLM feature in use cannot be combined with layer routes."""
