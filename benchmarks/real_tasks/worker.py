"""What `vllm serve --worker-extension-cls` adds to flux's workers, so that variants share one."""

from typing import Any


class SwitchingWorker:
    """Mixed into vLLM's worker; its methods are called through `/collective_rpc`."""

    def settle_flux(self: Any) -> None:
        """Wait until the decisions of steps in flight stand in the log."""
        self.flux_status()
