"""Which layers share a KV cache group: clusters that give blocks back together.

vLLM's groups draw blocks of one size from one pool, so all of them hold as many layers. A group
with fewer is padded and pays for the layers that it lacks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flux_vllm.errors import FluxConfigError

MOST_GROUPS = 8
"""Every step costs the scheduler and the worker's metadata some time a group."""
ROUTED_GROUPS = (6, 10)
"""Least and most where routes differ by request: a cluster is freed once all its layers are
SPARSE, so smaller ones free more."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """How a model's layers are cut into KV cache groups."""

    size: int
    """Layers a group."""
    sparse: tuple[tuple[int, ...], ...]
    """Layers of each group that can be freed: `size` of them, or one fewer."""
    full_groups: int = 0
    """Groups of the other layers, the last one padded if they do not divide."""
    unfreed: tuple[int, ...] = ()
    """SPARSE layers that fill no cluster: they lie in the FULL groups and keep all their keys."""
    routed: int = 0
    """How many of `sparse`, the last ones, are freed for the requests alone that route all their
    layers SPARSE."""
    kept: int = 0
    """How many of these, the last ones, give nothing back: they hold a layer without a route."""

    @property
    def num_groups(self) -> int:
        """All groups, freed or not."""
        return len(self.sparse) + self.full_groups


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


def cluster_by_route(
    order: Sequence[int], always_sparse: Iterable[int], unrouted: Iterable[int] = ()
) -> Clusters:
    """Cut a model's layers into clusters that requests free by their routes.

    Layers that are often FULL lie together, so that the other clusters are often freed whole; those
    that always are lie last. The fewest padded layers win, then the most clusters.

    Args:
        order: all layers with a KV cache, those first that are seldom FULL.
        always_sparse: of them, those that are SPARSE for every request; they come first.
        unrouted: of them, those that get no route, hence are FULL for every request.

    Returns: Clusters.
    """
    always, never = set(always_sparse), set(unrouted)
    layers = sorted(order, key=lambda i: (i in never, i not in always))
    counts = [n for n in range(1, ROUTED_GROUPS[1] + 1) if _divides(len(layers), n)]
    finest = [n for n in counts if n >= min(ROUTED_GROUPS[0], len(layers))] or counts[-1:]
    count = min(finest, key=lambda n: (-(-len(layers) // n) * n, -n))
    # The smaller ones first: a padded cluster wastes least where it is freed most.
    size, larger = divmod(len(layers), count)
    ends = [size * i + max(0, i - (count - larger)) for i in range(count + 1)]
    clusters = tuple(tuple(layers[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    return Clusters(
        size=size + (larger > 0),
        sparse=clusters,
        routed=sum(not always.issuperset(cluster) for cluster in clusters),
        kept=sum(not never.isdisjoint(cluster) for cluster in clusters),
    )


def _divides(layers: int, count: int) -> bool:
    """Say whether vLLM keeps so many groups: it cuts the largest where one is far smaller."""
    smallest, larger = divmod(layers, count)
    return smallest > 0 and (not larger or smallest + 1 < 1.5 * smallest)
