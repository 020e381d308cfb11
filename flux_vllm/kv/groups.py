"""Which layers share a KV cache group: clusters of SPARSE layers, as large as the FULL groups.

vLLM's groups draw blocks of one size from one pool, so all of them hold as many layers. A group
with fewer is padded and pays for the layers that it lacks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from flux_vllm.errors import FluxConfigError

MOST_GROUPS = 8
"""Every step costs the scheduler and the worker's metadata some time a group."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """How a model's layers are cut into KV cache groups."""

    size: int
    """Layers a group."""
    sparse: tuple[tuple[int, ...], ...]
    """Layers of each freed group, `size` of them."""
    full_groups: int
    """Groups of the other layers, the last one padded if they do not divide."""
    unfreed: tuple[int, ...]
    """SPARSE layers that fill no cluster: they lie in the FULL groups and keep all their keys."""

    @property
    def num_groups(self) -> int:
        """All groups, freed or not."""
        return len(self.sparse) + self.full_groups

    @property
    def freed_share(self) -> float:
        """Share of the blocks of an endless request that are given back, 0 to 1."""
        return len(self.sparse) / self.num_groups


def cluster_layers(layers: Iterable[int], sparse_layers: Iterable[int]) -> Clusters:
    """Cut a model's layers into groups that leave a long request the fewest blocks to hold.

    Among equals the fewest groups win.

    Args:
        layers: indices of all layers with a KV cache.
        sparse_layers: of them, those that are SPARSE for every request.

    Returns: Clusters.
    Raises: FluxConfigError: too few SPARSE layers for at most `MOST_GROUPS` groups.
    """
    total, sparse = len(set(layers)), sorted(set(sparse_layers))
    best: tuple[int, int, int, int] | None = None
    for size in range(1, len(sparse) + 1):
        for count in range(1, len(sparse) // size + 1):
            others = total - count * size
            # vLLM takes its smallest kind of layer for the size of all groups, or the largest kind
            # where that has less than one and a half times as many.
            if others not in (0, size) and others < 1.5 * size:
                continue
            full_groups = -(-others // size)
            found = (full_groups * size, count + full_groups, size, count)
            if count + full_groups <= MOST_GROUPS and (best is None or found < best):
                best = found
    if best is None:
        raise FluxConfigError(
            f"flux config: expected at least {-(-total // MOST_GROUPS)} of {total} layers that are "
            f'SPARSE for every request with "free_kv", found {len(sparse)}; make more layers '
            'SPARSE, or drop "free_kv"'
        )
    held, num_groups, size, count = best
    return Clusters(
        size=size,
        sparse=tuple(tuple(sparse[i * size : (i + 1) * size]) for i in range(count)),
        full_groups=held // size,
        unfreed=tuple(sparse[count * size :]),
    )
