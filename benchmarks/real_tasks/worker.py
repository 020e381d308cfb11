"""What `vllm serve --worker-extension-cls` adds to flux's workers."""

from typing import Any


class SettlingWorker:
    """Mixed into vLLM's worker; its method is called through `/collective_rpc`."""

    def settle_flux(self: Any) -> None:
        """Wait until the decisions of steps in flight stand in the log.

        `flux_status` does that too, but what it returns is no JSON.
        """
        self.flux_status()
