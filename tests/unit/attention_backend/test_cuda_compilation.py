"""Our kernels compile for GPUs, as the backend calls them: what the interpreter does not check.

Triton and NVIDIA's assembler come with its wheel, so no GPU is needed; nothing is run. Each launch
of the real builder and layers is compiled for its own arguments' types and constants. Triton either
interprets kernels or compiles them, for as long as a process lives: here a process of its own does.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from tests.conftest import REPOSITORY
from tests.unit.attention_backend.test_kernels_cases import FULL, SPARSE, Row, Shape, make_batch

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
DECODE = [Row(1, 90, SPARSE, False), Row(1, 97, FULL, False)]
MIXED = [Row(1, 92, SPARSE, False), Row(5, 288, SPARSE), Row(5, 56)]
SHAPE = Shape(dtype=torch.bfloat16, heads=12, kv_heads=2, head_dim=128)
GPUS = [(80, "triton"), (90, "triton"), (90, "fa3")]
"""Compute capability, kernels; FlashAttention-3 is for compute capability 9."""
PATTERNS = ["triangle", "xattention"]
SHAPES = [SHAPE, replace(SHAPE, learned_sinks=True)]
CASES = [(*gpu, shape) for gpu in GPUS for shape in SHAPES]
# vLLM's FlashAttention has a float8 cache from compute capability 9 on.
CASES += [(*gpu, replace(SHAPE, float8=True)) for gpu in GPUS[1:]]


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32"


class Compiler:
    """Stands in for a launch: compiles the kernel for a GPU, once for the same arguments."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.names: list[str] = []
        self._known: set[str] = set()

    def run(self, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in function.params]
        bound = dict(zip(names, args, strict=False))
        bound |= {name: kwargs.pop(name) for name in names if name in kwargs}
        constants = {
            parameter.name: bound[parameter.name]
            for parameter in function.params
            if parameter.is_constexpr or bound[parameter.name] is None
        }
        signature = {
            name: "constexpr" if name in constants else _type_of(bound[name]) for name in names
        }
        key = f"{function.fn.__qualname__} {signature} {constants} {kwargs}"
        if key in self._known:
            return
        self._known.add(key)
        by_place = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature, by_place)
        compiled = triton.compile(source, target=self._target, options=kwargs)
        assert compiled.asm["cubin"]
        self.names.append(function.fn.__qualname__)


def _compiler(monkeypatch: pytest.MonkeyPatch, capability: int) -> Compiler:
    """Take this machine for a GPU whose launches are compiled."""
    from flux_vllm.attention_backend.kernels import (
        block_sparse,
        fa3,
        strided_scores,
        triton_prefill,
    )
    from tests.helpers.cuda_backend import stand_for_gpu

    stand_for_gpu(monkeypatch, multiprocessors=132)
    compiler = Compiler(capability)
    run: Callable = lambda self, *args, **kwargs: compiler.run(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    for module in (block_sparse, strided_scores, triton_prefill):
        monkeypatch.setattr(module, "is_hopper", lambda: capability == 90)
    monkeypatch.setattr(fa3, "is_available", lambda: capability == 90)

    def attend(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros(query.shape[1], query.shape[0])

    monkeypatch.setattr(fa3, "attend", attend)
    return compiler


def _steps(folder: Any, kernels: str, pattern: str, shape: Shape) -> None:
    """Run a decode step, one of a graph's plans, and a step with prefill rows."""
    from tests.helpers.cuda_backend import BackendWorker

    for rows in (DECODE, MIXED):
        batch = make_batch(rows, shape, "cpu")
        worker = BackendWorker(folder, batch, kernels, sparse_pattern=pattern)
        for layer in worker.layers:
            layer.impl.vllm_flash_attn_version = 3 if kernels == "fa3" else 2
        worker.step(batch)
        worker.builder.use_full_cuda_graph = True
        worker.builder.max_cudagraph_size, worker.builder.max_num_splits = 64, 32
        worker.step(batch)


@pytest.mark.skipif(INTERPRETED, reason="kernels are compiled in a process of their own")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("capability", "kernels", "shape"), CASES, ids=str)
def test_every_kernel_compiles(
    capability: int,
    kernels: str,
    shape: Shape,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    compiler = _compiler(monkeypatch, capability)
    _steps(tmp_path_factory.getbasetemp(), kernels, pattern, shape)
    expected = {"_views_kernel"}
    if kernels == "triton":
        expected |= {"_share_kernel", "_join_kernel"}
    elif not shape.float8:
        expected |= {"_plans_kernel"}
    if pattern == "xattention":
        expected |= {"_score_kernel", "_choice_kernel"}
        expected |= {"_table_kernel", "_copy_kernel"} if kernels == "fa3" else {"_sparse_kernel"}
    else:
        expected |= {"_sink_kernel"} if kernels == "fa3" else {"_prefill_kernel"}
    assert expected <= set(compiler.names), compiler.names


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels")
def test_in_a_process_that_compiles() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(CASES) * len(PATTERNS)} passed, 1 skipped" in done.stdout
