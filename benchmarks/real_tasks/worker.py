"""What `vllm serve --worker-extension-cls` adds to flux's workers, so that variants share one."""

import dataclasses
from typing import Any


class SwitchingWorker:
    """Mixed into vLLM's worker; its methods are called through `/collective_rpc`."""

    def set_flux_threshold(self: Any, threshold: float) -> None:
        """Decide the routes of later requests by another threshold (policy `router`)."""
        runtime = self.flux_status.__self__
        runtime.config = dataclasses.replace(runtime.config, threshold=threshold)

    def settle_flux(self: Any) -> None:
        """Wait until the decisions of steps in flight stand in the log."""
        self.flux_status()
