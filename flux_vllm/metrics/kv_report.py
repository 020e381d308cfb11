"""What KV memory was given back, counted in the scheduler's process for `/metrics`."""

from flux_vllm.metrics.store import MetricStore

_FREED = "KV blocks that living requests gave back, over all KV cache groups."
_HELD = "KV memory that a request held on each GPU when it ended or was preempted, in bytes."
_ADMITTED = "Requests admitted that would have waited, had all others kept their KV blocks."
_MIB = 2**20
BYTE_BUCKETS = tuple(float(_MIB * 2**power) for power in range(0, 17))
"""1 MiB to 64 GiB."""


class KVReport:
    """Counts what is freed and held.

    Args:
        store: where the counters live.
        block_nbytes: of one block, over all layers of its group.
    """

    def __init__(self, store: MetricStore, block_nbytes: int) -> None:
        self._store = store
        self._block_nbytes = block_nbytes
        self.freed(0)
        self._store.add("flux_kv_admitted_requests", 0, _ADMITTED)

    def freed(self, blocks: int) -> None:
        """Count blocks that a living request gave back."""
        self._store.add("flux_kv_blocks_freed", blocks, _FREED)

    def admitted(self) -> None:
        """Count a request that got its first blocks only because others gave theirs back."""
        self._store.add("flux_kv_admitted_requests", 1, _ADMITTED)

    def held(self, blocks: int) -> None:
        """Count a request that gives back its last blocks."""
        self._store.observe(
            "flux_request_kv_bytes", float(blocks * self._block_nbytes), BYTE_BUCKETS, _HELD
        )
