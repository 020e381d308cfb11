"""The patterns' counts, options and CPU paths.

Oracle: the masks of tests/helpers/oracle, written from DESIGN.md and the papers apart from the
package and held to them key by key in test_oracle.py.
"""

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.cpu.pages import learn_page_layout
from flux_vllm.attention_backend.cpu.patterns import plan_chunk
from flux_vllm.attention_backend.cpu.prefill import Chunk
from flux_vllm.attention_backend.cuda.patterns import plan_batch
from flux_vllm.batch import Batch
from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.router.checkpoint import SPARSE_PATTERNS
from tests.conftest import REPOSITORY
from tests.helpers.oracle import naive
from tests.helpers.oracle.masks import visible

S, W, TAIL = 40, 70, 50
SCALE = 0.3
BLOCK, K, H = 32, 2, 32


@dataclass(frozen=True)
class Case:
    """A chunk of a prompt."""

    computed: int
    scheduled: int
    prompt_len: int
    heads: int = 4

    @property
    def end(self) -> int:
        return self.computed + self.scheduled

    def __str__(self) -> str:
        return f"{self.computed}+{self.scheduled}-of-{self.prompt_len}-N{self.heads}"


# Whole prompts, chunks before, across and within the last tokens, one query, a recomputed past.
CASES = [
    *(Case(0, n, n) for n in (1, 50, 111, 128, 129, 300)),
    *(Case(n, 97, 500) for n in (1, 100, 353, 354, 402)),
    Case(449, 1, 500),
    Case(450, 1, 500),
    Case(300, 200, 400),
    *(Case(150, 150, 300, heads) for heads in (2, 6)),
    Case(0, 1100, 1100),
    Case(700, 300, 2000),
    Case(1030, 1, 1031),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "triangle": {"tail_tokens": TAIL},
    "xattention": {"threshold": 0.5},
}


def make(name: str) -> SparsePattern:
    return make_pattern(name, S, W, OPTIONS[name])


def expected(name: str, case: Case, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Give the oracle's mask [N, Q, S]."""
    mask = visible(make(name), query, key, case.prompt_len, SCALE)
    return mask.expand(case.heads, -1, -1)


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw queries [Q, N, H], keys and values [S, K, H]; blocks differ widely in mass."""
    query = 4 * torch.randn(case.scheduled, case.heads, H)
    key, value = torch.randn(2, case.end, K, H)
    return query, key, value


@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_keys_are_those_seen(name: str) -> None:
    step = Batch(
        tuple(str(case) for case in CASES),
        np.array([case.prompt_len for case in CASES]),
        np.array([case.computed for case in CASES]),
        np.array([case.scheduled for case in CASES]),
        np.ones(len(CASES), bool),
    )
    counted = make(name).prefill_keys(step)
    if name == "xattention":
        assert counted is None
        return
    seen = [expected(name, case, *draw(case)[:2])[0].sum().item() for case in CASES]
    assert counted.tolist() == seen


@pytest.mark.parametrize("name", OPTIONS)
def test_up_to_its_reach_every_key_is_seen(name: str) -> None:
    pattern = make(name)
    case = Case(0, pattern.reach, 10_000)
    query, key, _ = draw(case)
    seen = visible(pattern, query, key, case.prompt_len, SCALE).expand(case.heads, -1, -1)
    assert seen.sum() == case.heads * case.end * (case.end + 1) // 2


@pytest.mark.parametrize("name", OPTIONS)
def test_is_local_is_what_prefill_reads(name: str) -> None:
    """What lies between sinks and window is given back during the prompt where this says so."""
    pattern = make(name)
    case = Case(0, 600, 600)
    seen = visible(pattern, *draw(case)[:2], case.prompt_len, SCALE)
    query, key = torch.arange(600)[:, None], torch.arange(600)
    between = (key >= S) & (key <= query - W)
    assert pattern.is_local == (not (seen & between).any())


def run_on_cpu(
    pattern: SparsePattern,
    case: Case,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend a chunk over a cache whose other blocks are NaN. Returns: [Q, N, H]."""
    used = -(-case.end // BLOCK)
    blocks = torch.randperm(used) + 1
    row = torch.full((used + 2,), 2**30, dtype=torch.int32)  # a stale end
    row[:used] = blocks
    cache = torch.full((used + 2, K, BLOCK, 2 * H), float("nan"))
    cache[blocks] = 0  # vLLM's cache begins as zeros: the last block's rest
    halves = cache.view(len(cache), K, 2 * BLOCK, H).chunk(2, dim=2)
    positions = torch.arange(case.end)
    slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
    layout = learn_page_layout("vec", BLOCK, H, torch.float32)
    torch.ops._C.cpu_attn_reshape_and_cache(key, value, *halves, slots, "vec", 1.0, 1.0, "auto")
    plan = plan_chunk(pattern, Chunk(case.computed, case.scheduled, case.prompt_len, row, BLOCK))
    output = torch.full_like(query, float("nan"))
    for _ in range(2):  # one plan serves every SPARSE layer of a step
        plan.attend(query, cache, layout, SCALE, sink_logits, output)
    return output


@pytest.mark.vllm
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_chunks_equal_masked_attention(name: str, case: Case) -> None:
    query, key, value = draw(case)
    output = run_on_cpu(make(name), case, query, key, value)
    exact = naive.attend(query, key, value, expected(name, case, query, key), SCALE)
    torch.testing.assert_close(output, exact, rtol=0, atol=2e-5)


@pytest.mark.vllm
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", [Case(0, 300, 300), Case(354, 97, 500)], ids=str)
def test_cpu_chunks_of_heads_with_learned_sinks(name: str, case: Case) -> None:
    query, key, value = draw(case)
    sink_logits = torch.linspace(-2, 14, case.heads)
    output = run_on_cpu(make(name), case, query, key, value, sink_logits)
    mask = expected(name, case, query, key)
    exact = naive.attend(query, key, value, mask, SCALE, sink_logits=sink_logits)
    torch.testing.assert_close(output, exact, rtol=0, atol=2e-5)


@pytest.mark.vllm
@pytest.mark.parametrize("case", [Case(0, 300, 300), Case(150, 97, 500)], ids=str)
def test_the_example_of_the_docs_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs" / "PATTERNS.md").read_text()
    sources = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = ["flux_vllm.patterns.anchors", "flux_vllm.attention_backend.cpu.patterns.anchors"]
    for name, source in zip(names, sources, strict=True):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, "docs/PATTERNS.md", "exec"), module.__dict__)
    pattern = make_pattern("anchors", S, W, {"spacing": 37})
    query, key, value = draw(case)
    output = run_on_cpu(pattern, case, query, key, value)
    positions, keys = torch.arange(case.computed, case.end)[:, None], torch.arange(case.end)
    mask = (keys < S) | (keys > positions - W) | (keys % 37 == 0)
    mask &= keys <= positions
    torch.testing.assert_close(
        output, naive.attend(query, key, value, mask, SCALE), rtol=0, atol=2e-5
    )
    one = [np.array([n]) for n in (case.prompt_len, case.computed, case.scheduled)]
    batch = Batch(("a",), *one, np.array([True]))
    assert pattern.prefill_keys(batch) == mask.sum()
    with pytest.raises(UnsupportedConfigurationError, match="'anchors': expected one that runs on"):
        plan_batch(pattern, batch, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("streaming", {"tail_tokens": 3}, r"\"pattern_options\" among \[\] .* found \['tail_tok"),
        ("triangle", {"tail": 3}, r"among \['tail_tokens'\] .* 'triangle', found \['tail'\]"),
        ("triangle", {"tail_tokens": 0}, r"whole number from 1 to .* \"tail_tokens\" .* found 0"),
        ("triangle", {"tail_tokens": True}, "found True; change it"),
        ("xattention", {"threshold": 0}, r"above 0 and at most 1 for \"threshold\" .* found 0"),
        ("xattention", {"threshold": 1.1}, "found 1.1"),
        ("xattention", {"threshold": "0.9"}, "found '0.9'"),
        ("xattention", {"stride": 32}, r"8 or 16 for \"stride\" .* found 32"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FluxConfigError, match=message):
        make_pattern(name, S, W, options)


def test_every_registered_pattern_is_tested() -> None:
    assert set(OPTIONS) == set(SPARSE_PATTERNS)
