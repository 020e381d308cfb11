"""How layers are cut into groups: few blocks held, few groups, and as vLLM then cuts them.

Oracle: a search over all sizes for the blocks held; vLLM's own grouping for what comes of it.
"""

import random

import pytest

from flux_vllm.errors import FluxConfigError
from flux_vllm.kv.groups import MOST_GROUPS, Clusters, cluster_layers

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
