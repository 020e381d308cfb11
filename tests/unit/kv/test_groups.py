"""How layers are cut into groups: few blocks held, few groups, and as vLLM then cuts them.

Oracle: a search over all sizes for the blocks held; vLLM's own grouping for what comes of it.
"""

import random

import pytest

from flux_vllm.errors import FluxConfigError
from flux_vllm.kv.groups import (
    MOST_GROUPS,
    ROUTED_GROUPS,
    Clusters,
    cluster_by_route,
    cluster_layers,
)

# layers, SPARSE of them: layers a group, freed groups, FULL groups
CASES = {
    (4, 3): (1, 3, 1),
    (4, 2): (2, 1, 1),
    (4, 4): (4, 1, 0),
    (32, 16): (16, 1, 1),
    (32, 24): (8, 3, 1),
    (30, 22): (10, 2, 1),
    (30, 24): (6, 4, 1),
    (30, 30): (30, 1, 0),
    (28, 14): (14, 1, 1),
    (26, 20): (4, 5, 2),
    (80, 64): (16, 4, 1),
}


@pytest.mark.parametrize(("counts", "expected"), CASES.items(), ids=str)
def test_cluster_layers_cases(counts, expected):
    layers, sparse = counts
    clusters = cluster_layers(range(layers), range(sparse))
    assert (clusters.size, len(clusters.sparse), clusters.full_groups) == expected


def test_cluster_layers_keeps_every_layer_once():
    chosen = [1, 2, 5, 6, 9, 11, 12]
    clusters = cluster_layers(range(14), chosen)
    freed = [layer for cluster in clusters.sparse for layer in cluster]
    assert sorted([*freed, *clusters.unfreed]) == chosen
    assert all(len(cluster) == clusters.size for cluster in clusters.sparse)
    assert clusters.num_groups == len(clusters.sparse) + clusters.full_groups


@pytest.mark.parametrize(("layers", "sparse"), [(30, 0), (30, 3), (32, 3), (80, 9)])
def test_cluster_layers_refuses_too_few(layers, sparse):
    with pytest.raises(FluxConfigError) as error:
        cluster_layers(range(layers), range(sparse))
    assert str(error.value) == (
        f"flux config: expected at least {-(-layers // MOST_GROUPS)} of {layers} layers that are "
        f'SPARSE for every request with "free_kv", found {sparse}; make more layers SPARSE, or '
        'drop "free_kv"'
    )


# layers: sizes of the clusters
ROUTED_CASES = {
    1: [1],
    4: [1, 1, 1, 1],
    11: [3, 4, 4],
    22: [3, 3, 4, 4, 4, 4],
    26: [3, 3, 4, 4, 4, 4, 4],
    28: [4] * 7,
    30: [3] * 10,
    32: [4] * 8,
    36: [4] * 9,
    80: [8] * 10,
}


@pytest.mark.parametrize(("layers", "sizes"), ROUTED_CASES.items(), ids=str)
def test_cluster_by_route_sizes(layers, sizes):
    clusters = cluster_by_route(range(layers), ())
    assert [len(cluster) for cluster in clusters.sparse] == sizes
    assert clusters.size == max(sizes)
    assert clusters.num_groups == clusters.routed == len(sizes)


def test_cluster_by_route_follows_the_order():
    order = [5, 3, 1, 0, 2, 4, 6, 7]
    clusters = cluster_by_route(order, always_sparse=[2, 7])
    assert [layer for cluster in clusters.sparse for layer in cluster] == [2, 7, 5, 3, 1, 0, 4, 6]
    assert clusters.routed == 6
    assert cluster_by_route(range(12), always_sparse=[3, 4, 5]).routed == 5  # one layer of a pair


def test_cluster_by_route_puts_unrouted_layers_last():
    order = [5, 3, 1, 0, 2, 4, 6, 7, 11, 10, 9, 8]
    clusters = cluster_by_route(order, always_sparse=[2], unrouted=[5, 0, 11])
    freed = [layer for cluster in clusters.sparse for layer in cluster]
    assert freed == [2, 3, 1, 4, 6, 7, 10, 9, 8, 5, 0, 11]
    assert (clusters.num_groups, clusters.routed, clusters.kept) == (6, 6, 2)


def test_cluster_by_route_keeps_every_layer_once():
    for layers in range(1, 130):
        clusters = cluster_by_route(range(layers), ())
        assert [layer for cluster in clusters.sparse for layer in cluster] == [*range(layers)]
        assert {len(cluster) for cluster in clusters.sparse} <= {clusters.size, clusters.size - 1}
        assert clusters.num_groups <= ROUTED_GROUPS[1]
        padded = clusters.num_groups * clusters.size / layers
        assert padded < (1.1 if layers not in (13, 17, 19, 25) else 1.3)


def _vllm_groups(num_layers: int, clusters: Clusters) -> list[tuple[bool, int]]:
    """Ask vLLM: (freed, layers) of each group."""
    from types import SimpleNamespace

    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    from flux_vllm.kv.register import register
    from flux_vllm.kv.spec import FluxSpec
    from flux_vllm.kv.worker import cluster_specs
    from flux_vllm.patterns import make_pattern
    from tests.unit.kv.pools import FULL

    register()
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)
        ),
        speculative_config=None,
    )
    specs = {f"model.layers.{i}.self_attn.attn": FULL for i in range(num_layers)}
    groups = get_kv_cache_groups(
        config, cluster_specs(specs, clusters, make_pattern("streaming", 8, 8))
    )
    return [(isinstance(g.kv_cache_spec, FluxSpec), len(g.layer_names)) for g in groups]


@pytest.mark.vllm
def test_vllm_cuts_groups_of_this_size():
    chooser = random.Random(0)
    seen = 0
    for _ in range(60):
        layers = chooser.randrange(2, 81)
        sparse = chooser.sample(range(layers), chooser.randrange(-(-layers // 4), layers + 1))
        clusters = cluster_layers(range(layers), sparse)
        groups = _vllm_groups(layers, clusters)
        assert [size for freed, size in groups if freed] == [clusters.size] * len(clusters.sparse)
        full = [size for freed, size in groups if not freed]
        assert len(full) == clusters.full_groups <= MOST_GROUPS
        assert all(size <= clusters.size for size in full)
        seen += len(full) > 1
    assert seen > 5


@pytest.mark.vllm
@pytest.mark.parametrize("layers", [2, 4, 11, 17, 22, 26, 28, 30, 32, 36, 64, 80, 126])
def test_vllm_cuts_clusters_by_route_so(layers):
    order = random.Random(layers).sample(range(layers), layers)
    clusters = cluster_by_route(order, order[: layers // 3])
    groups = _vllm_groups(layers, clusters)
    assert all(freed for freed, _ in groups)
    assert sorted(size for _, size in groups) == sorted(map(len, clusters.sparse))
