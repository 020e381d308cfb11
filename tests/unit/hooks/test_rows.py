"""Batch from the real data structures of both model runners, of vLLM 0.32 and of 0.33.

Oracle: each request's place in its life, written down by hand. The batches are made in
`step_batches.py`, which says what of them is vLLM's and what is not. All of this file runs again in
a process that imports vLLM 0.33's Python files (fetched once by `tools/vllm_sources.py`) instead of
the installed 0.32. Pinned: a one-token prompt tail is prefill; a resumed request's outputs are
prefill while they are recomputed; rows are never known by their place.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flux_vllm.batch import Batch
from tests.unit.hooks.step_batches import Req, RunnerV1, RunnerV2, rows_of

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[3]
OTHER_VERSION = "0.33.0"
IN_OTHER = "FLUX_TEST_OTHER_VLLM"  # set in the process that runs this file on OTHER_VERSION

# (request, is_prefill)
LIVES: dict[str, tuple[Req, bool]] = {
    "whole-prompt": (Req("a", 40, 0, 40), True),
    "one-token-prompt": (Req("a", 1, 0, 1), True),
    "first-chunk": (Req("a", 100, 0, 64), True),
    "middle-chunk": (Req("a", 100, 33, 30), True),
    "last-chunk": (Req("a", 100, 64, 36), True),
    "one-token-tail": (Req("a", 65, 64, 1), True),
    "one-token-chunk": (Req("a", 65, 20, 1), True),
    "prefix-hit": (Req("a", 100, 48, 52), True),
    "prefix-hit-first-chunk": (Req("a", 100, 48, 20), True),
    "first-decode": (Req("a", 40, 40, 1, outputs=1), False),
    "decode": (Req("a", 40, 57, 1, outputs=18), False),
    "speculative-decode": (Req("a", 40, 57, 4, outputs=18, drafts=3), False),
    "resumed-prompt-part": (Req("a", 40, 0, 30, outputs=9, resumed=True), True),
    "resumed-past-prompt": (Req("a", 40, 30, 15, outputs=9, resumed=True), True),
    "resumed-outputs-part": (Req("a", 40, 42, 3, outputs=9, resumed=True), True),
    "resumed-outputs-rest": (Req("a", 40, 42, 7, outputs=9, resumed=True), True),
    "resumed-all": (Req("a", 40, 0, 49, outputs=9, resumed=True), True),
    "resumed-prefix-hit-in-outputs": (
        Req("a", 40, 48, 12, outputs=20, resumed=True),
        True,
    ),
}


@pytest.fixture(params=[RunnerV1, RunnerV2], ids=["V1", "V2"])
def runner(request: pytest.FixtureRequest) -> RunnerV1 | RunnerV2:
    return request.param()


def expected(req: Req, is_prefill: bool) -> tuple:
    return req.prompt, req.computed, req.scheduled, is_prefill


def test_version() -> None:
    """Each process tests the version that it is meant to test."""
    import vllm

    wanted = os.environ.get(IN_OTHER, "0.32.0")
    assert vllm.__version__.split("+")[0] == wanted


class TestOneRow:
    @pytest.mark.parametrize("name", LIVES)
    def test_place_in_its_life(self, runner, name: str) -> None:
        req, is_prefill = LIVES[name]
        runner.add(req)
        runner.settle()
        found = rows_of(runner.step([req]))
        assert found == {"a": expected(req, is_prefill)}

    def test_newest_token_of_a_resumed_request(self, runner) -> None:
        """V2 knows that it is recomputed; V1 takes it for the decode step that it also is."""
        req = Req("a", 40, 48, 1, outputs=9, resumed=True)
        runner.add(req)
        runner.settle()
        is_prefill = isinstance(runner, RunnerV2)
        assert rows_of(runner.step([req])) == {"a": expected(req, is_prefill)}


class TestBatches:
    def lives(self) -> tuple[list[Req], dict[str, tuple]]:
        """One request of each kind that a step may mix."""
        names = ["decode", "one-token-tail", "middle-chunk", "whole-prompt", "first-decode"]
        names += ["resumed-past-prompt", "prefix-hit"]
        reqs, rows = [], {}
        for name in names:
            req, is_prefill = LIVES[name]
            req = Req(**{**req.__dict__, "name": name})
            reqs.append(req)
            rows[name] = expected(req, is_prefill)
        return reqs, rows

    @pytest.mark.parametrize("reverse", [False, True], ids=["in-order", "reversed"])
    def test_mixed(self, runner, reverse: bool) -> None:
        reqs, rows = self.lives()
        for req in reqs:
            runner.add(req)
        runner.settle()
        context = runner.step(reqs[::-1] if reverse else reqs)
        assert rows_of(context) == rows
        assert len(context) == len(rows)

    def test_order_is_the_runners(self, runner) -> None:
        """The query's rows lie in this order."""
        reqs, _ = self.lives()
        for req in reqs:
            runner.add(req)
        runner.settle()
        found = runner.step(reqs).request_ids
        if isinstance(runner, RunnerV1):
            assert list(found) == runner.batch.req_ids
        else:  # decode-like rows lead
            lengths = [{req.name: req.scheduled for req in reqs}[name] for name in found]
            assert lengths == sorted(lengths)

    def test_rows_that_left(self, runner) -> None:
        """Others move into their places; what lies behind the last row is not read."""
        reqs, rows = self.lives()
        for req in reqs:
            runner.add(req)
        runner.settle()
        for name in ("decode", "whole-prompt", "prefix-hit"):
            runner.remove(name)
            del rows[name]
        runner.settle()
        left = [req for req in reqs if req.name in rows]
        assert rows_of(runner.step(left)) == rows
        newcomer = Req("new", 33, 0, 33)
        runner.add(newcomer)
        runner.settle()
        rows["new"] = expected(newcomer, True)
        assert rows_of(runner.step([newcomer, *left])) == rows

    def test_swapped_rows(self) -> None:
        reqs, rows = self.lives()
        runner = RunnerV1()
        for req in reqs:
            runner.add(req)
        runner.settle()
        before = runner.step(reqs).request_ids
        runner.batch.swap_states(0, 3)
        context = runner.step(reqs)
        assert context.request_ids[0] == before[3]
        assert rows_of(context) == rows

    def test_padded_rows(self) -> None:
        """A CUDA graph's spare rows are no requests."""
        reqs, rows = self.lives()
        runner = RunnerV2()
        for req in reqs:
            runner.add(req)
        assert rows_of(runner.step(reqs, padded_rows=5)) == rows

    def test_resumed_in_another_slot(self, runner) -> None:
        """Preempted with others running: the request comes back with what it had generated."""
        first, other = Req("a", 40, 45, 1, outputs=6), Req("b", 20, 25, 1, outputs=6)
        for req in (first, other):
            runner.add(req)
        runner.settle()
        runner.remove("a")
        third = Req("c", 30, 0, 30)
        runner.add(third)
        back = Req("a", 40, 0, 46, outputs=6, resumed=True)
        runner.add(back)
        runner.settle()
        assert rows_of(runner.step([other, third, back])) == {
            "a": expected(back, True),
            "b": expected(other, False),
            "c": expected(third, True),
        }

    def test_arrays_are_copies(self, runner) -> None:
        """The runner goes on changing its own while a step is still being counted."""
        req = Req("a", 40, 0, 40)
        runner.add(req)
        runner.settle()
        context = runner.step([req])
        before = rows_of(context)
        runner.remove("a")
        runner.add(Req("b", 7, 3, 4))
        runner.settle()
        runner.step([Req("b", 7, 3, 4)])
        assert rows_of(context) == before


class TestWarmup:
    @pytest.mark.parametrize("is_warmup", [False, True])
    def test_is_what_the_worker_says(self, is_warmup: bool) -> None:
        runner = RunnerV2()
        req = Req("_warmup_0", 40, 0, 40)  # vLLM's own begin so, and so may a client's
        runner.add(req)
        assert runner.step([req], is_warmup=is_warmup).is_warmup == is_warmup


class TestBatch:
    def make(self, *rows: tuple[int, int, int]) -> Batch:
        numbers = np.array(rows, dtype=np.int64).reshape(len(rows), 3)
        return Batch(
            request_ids=tuple(str(i) for i in range(len(rows))),
            computed=numbers[:, 0],
            scheduled=numbers[:, 1],
            prompt_lens=numbers[:, 2],
            is_prefill=numbers[:, 0] < numbers[:, 2],
        )

    def test_no_rows(self) -> None:
        context = self.make()
        assert len(context) == 0

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(AssertionError, match="scheduled: one entry a request expected"):
            Batch(
                request_ids=("a",),
                prompt_lens=np.array([1]),
                computed=np.array([0]),
                scheduled=np.array([1, 2]),
                is_prefill=np.array([True]),
            )


@pytest.mark.slow
def test_all_of_this_with_the_other_version(tmp_path: Path) -> None:
    from tools.vllm_sources import vllm_sources

    # vLLM takes the CPU for its platform where its distribution's version says so.
    metadata = tmp_path / f"vllm-{OTHER_VERSION}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {OTHER_VERSION}+cpu\n")
    environment = os.environ | {
        "PYTHONPATH": f"{vllm_sources(OTHER_VERSION)}{os.pathsep}{tmp_path}",
        IN_OTHER: OTHER_VERSION,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    command += ["-k", "not with_the_other_version"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\b\d\d+ passed", done.stdout)
