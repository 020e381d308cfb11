"""Start-up: every refusal by its message, and the memory that is set aside.

Oracle: the messages; and the sizes of real tensors. Configurations are the least that is read of
them; `test_llm.py` meets some of the same errors through a real `vllm.LLM(...)`, and
`test_attach.py` has what the model itself decides.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flux_vllm.config import FluxConfig
from flux_vllm.errors import FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.inputs import parse_inputs
from flux_vllm.router.model import LayerRouter
from flux_vllm.startup.attach import _over_ranks, attach
from flux_vllm.startup.check import check_configuration, check_features, check_probe
from flux_vllm.startup.memory import reserve_buffers
from flux_vllm.startup.router_file import read_router_for
from tests.unit.startup.fakes import CPU, H, L, make_config, make_speculation, runner_of, write

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX_METRICS_DIR", raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("uses_mrope", [False, True])
def test_a_step_shorter_than_a_probe(device: str, uses_mrope: bool, tmp_path: Path) -> None:
    inputs = parse_inputs(["tail:1"], [20, 30], [])
    tight = {"device__device_type": device, "model__uses_mrope": uses_mrope}
    check_probe(inputs, make_config(tmp_path, scheduler__max_num_batched_tokens=50, **tight))
    config = make_config(tmp_path, scheduler__max_num_batched_tokens=49, **tight)
    if device == "cpu" and not uses_mrope:
        check_probe(inputs, config)
        return
    with pytest.raises(UnsupportedConfigurationError, match="at least 50, the tokens of a probe"):
        check_probe(inputs, config)


REFUSED = {
    "decode context parallel": {"parallel__decode_context_parallel_size": 2},
    "prefill context parallel": {"parallel__prefill_context_parallel_size": 2},
    "dual batch overlap": {"parallel__use_ubatching": True},
    "a KV cache of dtype fp8_per_token_head": {"cache__cache_dtype": "fp8_per_token_head"},
    "layers left out of a float8 KV cache (--kv-cache-dtype-skip-layers)": {
        "cache__cache_dtype": "fp8",
        "cache__kv_cache_dtype_skip_layers": ["0"],
    },
    "a KV cache of bfloat16 for a model of torch.float32 on the CPU": {
        "cache__cache_dtype": "bfloat16"
    },
    "prefix_match_unit": {"cache__prefix_match_unit": 16},
    "kv_sharing_fast_prefill": {"cache__kv_sharing_fast_prefill": True},
    "speculative decoding by medusa": {"root__speculative_config": make_speculation("medusa")},
    "a drafter that reads the model's own KV cache (Gemma 4 MTP)": {
        "root__speculative_config": make_speculation("mtp", is_gemma4=True)
    },
    "a drafter behind pipeline stages": {
        "root__speculative_config": make_speculation("eagle3"),
        "parallel__pipeline_parallel_size": 2,
    },
    "a drafter with --attention-backend flux": {
        "root__speculative_config": make_speculation("eagle", backend="FLUX")
    },
    "multi-head latent attention (MLA)": {"model__use_mla": True},
    "an encoder-decoder model": {"model__is_encoder_decoder": True},
    "a pooling or encoder model": {"model__runner_type": "pooling"},
    "a model without attention": {"model__is_attention_free": True},
    "bidirectional attention over images (for text alone: --limit-mm-per-prompt "
    """'{"image": 0}')""": {"model__is_mm_prefix_lm": True},
    "reference sliding window attention": {"model__rswa_window": 128},
    "prefill context parallel, dual batch overlap": {
        "parallel__prefill_context_parallel_size": 2,
        "parallel__use_ubatching": True,
    },
}


class TestFeatures:
    @pytest.mark.parametrize(("what", "changes"), REFUSED.items(), ids=REFUSED)
    @pytest.mark.parametrize("where", ["front-end", "worker"])
    def test_refused(self, tmp_path: Path, what: str, changes: dict, where: str) -> None:
        write(tmp_path)
        config = make_config(tmp_path, **changes)
        check = {
            "front-end": check_configuration,
            "worker": lambda given: attach(runner_of(nn.Module()), given, CPU),
        }[where]
        with pytest.raises(UnsupportedConfigurationError) as error:
            check(config)
        assert str(error.value) == (
            "--attention-backend flux: expected none of the features that layer routes cannot be "
            f"combined with, found {what}; switch it off, or serve without --attention-backend flux"
        )

    @pytest.mark.parametrize("pair", ["float16 bfloat16", "bfloat16 float16", "float32 float32"])
    def test_kv_cache_as_wide_as_the_model(self, tmp_path: Path, pair: str) -> None:
        write(tmp_path)
        dtype, cache = pair.split()
        changes = {"model__dtype": getattr(torch, dtype), "cache__cache_dtype": cache}
        check_configuration(make_config(tmp_path, **changes))

    @pytest.mark.parametrize("cache", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_float8_kv_cache(self, tmp_path: Path, cache: str) -> None:
        write(tmp_path)
        check_configuration(make_config(tmp_path, cache__cache_dtype=cache))

    def test_float8_kv_cache_on_a_gpu_is_for_bfloat16(self, tmp_path: Path) -> None:
        changes = {"cache__cache_dtype": "fp8", "model__dtype": torch.bfloat16}
        config = make_config(tmp_path, **changes)
        config.device_config.device_type = "cuda"
        check_features(config)
        config.model_config.dtype = torch.float16
        with pytest.raises(
            UnsupportedConfigurationError,
            match=r"found a KV cache of fp8 for a model of torch.float16 on a GPU; ",
        ):
            check_features(config)

    def test_kv_cache_of_another_width_on_a_gpu(self, tmp_path: Path) -> None:
        """Is vLLM's to judge."""
        config = make_config(tmp_path, cache__cache_dtype="bfloat16")
        config.device_config.device_type = "cuda"
        check_features(config)

    def test_connectors_and_offloading_are_carried(self, tmp_path: Path) -> None:
        write(tmp_path)
        """vLLM turns offloading into a connector."""
        check_configuration(make_config(tmp_path, root__kv_transfer_config=object()))

    def test_kernels_are_for_cuda(self, tmp_path: Path) -> None:
        write(tmp_path)
        with pytest.raises(
            FluxConfigError, match=r"expected no \"kernels\" on the CPU, found 'tri"
        ):
            check_configuration(make_config(tmp_path, {"kernels": "triton"}))

    @pytest.mark.parametrize("policy", ["router", "sparse", "full"])
    def test_options_of_another_pattern(self, tmp_path: Path, policy: str) -> None:
        write(tmp_path, sparse_pattern="triangle")
        flux = {"policy": policy, "pattern_options": {"threshold": 0.9}}
        with pytest.raises(FluxConfigError) as error:
            check_configuration(make_config(tmp_path, flux))
        assert str(error.value) == (
            "flux config: expected \"pattern_options\" among ['tail_tokens'] for sparse_pattern "
            "'triangle', found ['threshold']; remove or correct them"
        )
        check_configuration(make_config(tmp_path, flux | {"sparse_pattern": "xattention"}))

    @pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle", "eagle3", "mtp"])
    def test_speculation_is_carried(self, tmp_path: Path, method: str) -> None:
        write(tmp_path)
        speculative = make_speculation(method, backend="FLASH_ATTN")
        check_configuration(make_config(tmp_path, root__speculative_config=speculative))


class TestRouter:
    @pytest.mark.parametrize("policy", ["router", "full"])
    @pytest.mark.parametrize(
        ("sizes", "what"),
        [
            ({"num_layers": 3}, "layers 4 as in the model, found 3"),
            ({"head_dim": 64}, "head_dim 32 as in the model, found 64"),
        ],
        ids=["layers", "head_dim"],
    )
    def test_does_not_fit(self, tmp_path: Path, sizes: dict, what: str, policy: str) -> None:
        write(tmp_path, **sizes)
        with pytest.raises(RouterCheckpointError) as error:
            check_configuration(make_config(tmp_path, {"policy": policy}))
        assert str(error.value) == (
            f"router: expected {what} (trained for 'org/Other'); give this model's own router with "
            """--additional-config '{"flux": {"router": "PATH"}}'"""
        )

    def test_heads_of_several_sizes(self, tmp_path: Path) -> None:
        """Any of them may be that of the routed layers; attaching says which."""
        layers = [SimpleNamespace(head_size=size) for size in (H, 64, H, 64)]
        write(tmp_path, head_dim=64)
        check_configuration(make_config(tmp_path, model__model_arch_config=layers))
        with pytest.raises(RouterCheckpointError, match="head_dim 32 as in the model, found 64"):
            check_configuration(make_config(tmp_path, model__model_arch_config=layers[::2] * 2))

    def test_that_pools_the_latest_tokens_alone(self, tmp_path: Path) -> None:
        write(tmp_path, pool_prefix=False)
        check_configuration(make_config(tmp_path))

    def test_of_an_unnamed_model(self, tmp_path: Path) -> None:
        write(tmp_path, num_layers=3, base_model="")
        with pytest.raises(RouterCheckpointError, match=r"\(trained for an unnamed model\)|'an u"):
            check_configuration(make_config(tmp_path))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RouterCheckpointError) as error:
            check_configuration(make_config(tmp_path))
        assert str(error.value).startswith(
            f"expected a router at {tmp_path / 'flux/flux_router.safetensors'}, found nothing there"
        )

    @pytest.mark.parametrize("policy", ["router", "full", "sparse"])
    def test_missing_where_it_was_said_to_be(self, tmp_path: Path, policy: str) -> None:
        config = make_config(tmp_path, {"router": str(tmp_path / "r"), "policy": policy})
        with pytest.raises(RouterCheckpointError, match=r"^expected a router at .*/r, found"):
            check_configuration(config)

    def test_beside_the_weights(self, tmp_path: Path) -> None:
        write(tmp_path / "flux", window_tokens=512)
        _, info = read_router_for(FluxConfig(), make_config(tmp_path))
        assert info is not None
        assert info.window_tokens == 512
        write(tmp_path, window_tokens=256)
        for flux in ({}, {"policy": "full"}):
            with pytest.raises(RouterCheckpointError, match=r"^expected one router beside the "):
                check_configuration(make_config(tmp_path, flux))
        check_configuration(make_config(tmp_path, {"router": str(tmp_path / "flux")}))

    @pytest.mark.parametrize("place", ["", "flux"])
    @pytest.mark.parametrize("revision", [None, "main", "v2"])
    def test_in_the_snapshot_of_a_hub_id(
        self, tmp_path: Path, revision: str | None, place: str
    ) -> None:
        """The router is the one of the snapshot that the model's own files come from."""
        repository = tmp_path / "models--org--Served"
        for commit, ref, window in (("a1", "main", 256), ("b2", "v2", 512)):
            folder = repository / "snapshots" / commit
            (folder / place).mkdir(parents=True)
            write(folder / place, window_tokens=window)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / ref).write_text(commit)
        config = make_config(Path("org/Served"), model__revision=revision)
        config.load_config.download_dir = str(tmp_path)
        check_configuration(config)
        _, info = read_router_for(FluxConfig(), config)
        assert info is not None
        assert info.window_tokens == (512 if revision == "v2" else 256)

    def test_two_in_the_snapshot(self, tmp_path: Path) -> None:
        folder = tmp_path / "models--org--Served" / "snapshots" / "a1"
        (folder.parent.parent / "refs").mkdir(parents=True)
        (folder.parent.parent / "refs" / "main").write_text("a1")
        for place in (folder, folder / "flux"):
            place.mkdir(parents=True)
            write(place)
        config = make_config(Path("org/Served"))
        config.load_config.download_dir = str(tmp_path)
        with pytest.raises(RouterCheckpointError, match=r"expected one router .*/flux/.* and .*/a"):
            check_configuration(config)

    @pytest.mark.parametrize("revision", [None, "v2"])
    def test_missing_in_the_snapshot(self, tmp_path: Path, revision: str | None) -> None:
        config = make_config(Path("org/Served"), model__revision=revision)
        config.load_config.download_dir = str(tmp_path)
        with pytest.raises(RouterCheckpointError) as error:
            check_configuration(config)
        assert str(error.value).startswith(
            f"expected a router in the cached snapshot of org/Served (revision "
            f"{revision or 'main'}), found no flux/flux_router.safetensors under {tmp_path}; "
            "nothing is downloaded for it: fetch the file with `hf download org/Served --include "
            "'*flux_router.safetensors'`, give its place as --additional-config"
        )
        config.additional_config = {"flux": {"policy": "full"}}
        check_configuration(config)  # which needs none

    def test_truncated(self, tmp_path: Path) -> None:
        path = write(tmp_path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(RouterCheckpointError, match="it may be truncated, copy or write"):
            check_configuration(make_config(tmp_path))

    def test_nan(self, tmp_path: Path) -> None:
        router = LayerRouter(L, H)
        router.linear("head.2")[0].data[2, 0, 0] = float("nan")
        info = RouterInfo(
            base_model="", num_layers=L, head_dim=H, pool_tokens=1, sink_tokens=0, window_tokens=1
        )
        write_router(tmp_path, router, info)
        with pytest.raises(RouterCheckpointError, match=r"in layers\.2\.head\.2\.weight, found Na"):
            check_configuration(make_config(tmp_path))

    @pytest.mark.parametrize("policy", ["full", "sparse"])
    def test_not_needed(self, tmp_path: Path, policy: str) -> None:
        flux = {"policy": policy, "sink_tokens": 1, "window_tokens": 2}
        check_configuration(make_config(tmp_path, flux))

    def test_sizes_from_a_router_that_is_there(self, tmp_path: Path) -> None:
        write(tmp_path)
        check_configuration(make_config(tmp_path, {"policy": "sparse"}))

    def test_no_sizes(self, tmp_path: Path) -> None:
        with pytest.raises(FluxConfigError, match='expected "sink_tokens" and "window_tokens"'):
            check_configuration(make_config(tmp_path, {"policy": "sparse"}))

    def test_layer_beyond_the_model(self, tmp_path: Path) -> None:
        flux = {"policy": "static", "sparse_layers": [L], "sink_tokens": 1, "window_tokens": 2}
        with pytest.raises(FluxConfigError, match=r"sparse_layers from 0 to 3 .*, found \[4\]"):
            check_configuration(make_config(tmp_path, flux))


class TestOverRanks:
    @pytest.mark.parametrize("stages", [1, 2])
    @pytest.mark.parametrize("ranks", [1, 4])
    def test_mean_over_ranks_sum_over_stages(
        self, ranks: int, stages: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm import distributed

        group = SimpleNamespace(world_size=stages, device_group="stages")
        monkeypatch.setattr(distributed, "get_pp_group", lambda: group)
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda t, group: t.add_(10 * (group == "stages"))
        )
        monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(
            distributed, "tensor_model_parallel_all_reduce", lambda t: t * ranks + ranks
        )
        tensor = torch.tensor([3.0, 5.0])
        mean = [3.0, 5.0] if ranks == 1 else [4.0, 6.0]
        assert _over_ranks(tensor).tolist() == [x + 10 * (stages - 1) for x in mean]


class TestProbe:
    """What an extra forward of one prompt's tokens cannot be combined with."""

    @pytest.mark.parametrize("is_moe_model", [True, None], ids=["experts", "unknown"])
    def test_data_parallel_mixture_of_experts(
        self, tmp_path: Path, is_moe_model: bool | None
    ) -> None:
        """vLLM says None where it has not looked: such a model is taken for one of experts."""
        write(tmp_path)
        changes = {
            "parallel__data_parallel_size": 2,
            "parallel__is_moe_model": is_moe_model,
        }
        with pytest.raises(UnsupportedConfigurationError, match="run every forward together"):
            check_configuration(make_config(tmp_path, **changes))
        check_configuration(make_config(tmp_path, {"policy": "full"}, **changes))

    def test_data_parallel_dense_model(self, tmp_path: Path) -> None:
        write(tmp_path)
        check_configuration(make_config(tmp_path, parallel__data_parallel_size=2))

    @pytest.mark.parametrize(("budget", "refused"), [(255, True), (256, False)])
    def test_budget_of_a_step(self, tmp_path: Path, budget: int, refused: bool) -> None:
        """On a GPU: kernels and workspaces are made for as many tokens as a step may have."""
        write(tmp_path)
        changes = {"scheduler__max_num_batched_tokens": budget, "device__device_type": "cuda"}
        config = make_config(tmp_path, **changes)
        if refused:
            with pytest.raises(UnsupportedConfigurationError, match="at least 256, .* found 255"):
                check_configuration(config)
        else:
            check_configuration(config)
        check_configuration(make_config(tmp_path, **changes | {"device__device_type": "cpu"}))


def test_memory_on_the_cpu_is_vllms(tmp_path: Path) -> None:
    assert reserve_buffers(12345, SimpleNamespace(device=CPU), None) == 12345
