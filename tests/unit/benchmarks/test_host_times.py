"""Host times: what is timed, and that it is left as it was. Oracle: calls counted by hand."""

import importlib
from types import SimpleNamespace

import pytest

from benchmarks.host_times import FUNCTIONS, HostTimer, TimedWorker


class Base:
    def execute_model(self) -> int:
        return self.sample_tokens() + 1

    def sample_tokens(self) -> int:
        return 1

    @classmethod
    def read(cls) -> str:
        return cls.__name__


class Derived(Base):
    pass


def test_time_counts_calls_and_what_they_call() -> None:
    originals = dict(vars(Base))
    timer = HostTimer()
    for name in ("execute_model", "sample_tokens", "read"):
        timer.time(Base, name)
    assert Derived().execute_model() == 2
    assert Derived().sample_tokens() == 1
    assert Derived.read() == "Derived"
    timer.stop()
    Base().execute_model()
    assert {name: calls for name, (calls, _) in timer.totals.items()} == {
        "Base.execute_model": 1,
        "Base.sample_tokens": 2,
        "Base.read": 1,
    }
    assert timer.totals["Base.execute_model"][1] > 0
    assert dict(vars(Base)) == originals


def test_time_counts_calls_that_fail() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    owner = SimpleNamespace(__name__="a.module", fail=fail)
    timer = HostTimer()
    timer.time(owner, "fail")
    with pytest.raises(KeyboardInterrupt):
        owner.fail()
    timer.stop()
    assert timer.totals["module.fail"][0] == 1


def test_worker_finds_the_runner_class() -> None:
    worker = TimedWorker()
    worker.model_runner = Derived()  # type: ignore[attr-defined]
    worker.begin_host_times()
    worker.model_runner.execute_model()  # type: ignore[attr-defined]
    times = worker.end_host_times()
    assert [(name, calls) for name, (calls, _) in times.items()] == [
        ("Base.execute_model", 1),
        ("Base.sample_tokens", 1),
    ]


@pytest.mark.vllm
@pytest.mark.parametrize(("module", "owner", "name"), FUNCTIONS)
def test_functions_exist(module: str, owner: str | None, name: str) -> None:
    loaded = importlib.import_module(module)
    assert callable(getattr(loaded if owner is None else getattr(loaded, owner), name))
    assert name in vars(loaded if owner is None else getattr(loaded, owner))
