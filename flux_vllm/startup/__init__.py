"""From a configuration and a loaded model to a running FluxRuntime."""
