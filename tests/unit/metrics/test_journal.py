"""The ring of recent routes: what is read is what was written, whole, and of living workers only.

Oracle: lists kept by hand; for reading during writing, records whose fields all follow from their
number. Pinned: a record that is half written is passed over; a worker that was killed without a
chance to say so leaves nothing that looks alive.
"""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flux_vllm.metrics.journal import (
    REQUEST_ID_BYTES,
    RouteJournal,
    WorkerRoutes,
    read_journals,
    record_dtype,
)

L = 4
ABOUT = {"model_name": "m", "routed_layers": [0, 1, 3]}

# Fills a journal with records that say their own number everywhere, until it is killed.
WRITER = """\
import sys
from pathlib import Path
import numpy as np
from flux_vllm.metrics.journal import RouteJournal
journal = RouteJournal(Path(sys.argv[1]), {"model_name": "m"}, num_layers=80, capacity=4)
number = 0
while True:
    number += 1
    journal.append(
        str(number) * 8, number, np.full(80, number % 2, np.int8), np.full(80, number, np.float32)
    )
    if number == 10:
        print("ready", flush=True)
"""


def append(journal: RouteJournal, number: int, name: str | None = None) -> None:
    journal.append(
        f"request-{number}" if name is None else name,
        10 * number,
        np.array([1, 0, -1, number % 2], dtype=np.int8),
        np.array([0.75, 0.25, math.nan, number], dtype=np.float32),
    )


def only(directory: Path, limit: int = 100) -> WorkerRoutes:
    (found,) = read_journals(directory, limit)
    return found


def numbers(found: WorkerRoutes) -> list[int]:
    return found.records["number"].tolist()


def ring_file(directory: Path) -> Path:
    (file,) = directory.glob("flux-routes-*.ring")
    return file


def test_empty_folder(tmp_path: Path) -> None:
    assert read_journals(tmp_path, 10) == []


def test_no_request_yet(tmp_path: Path) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L)
    found = only(tmp_path)
    assert found.is_live
    assert found.about == ABOUT
    assert len(found.records) == 0
    del journal


def test_a_record_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_vllm.metrics.journal.time.time", lambda: 1234.5)
    journal = RouteJournal(tmp_path, ABOUT, L)
    append(journal, 3, "cmpl-ä-0-0123abcd")
    (record,) = only(tmp_path).records
    assert record["number"] == 1
    assert record["time"] == 1234.5
    assert record["request_id"].decode() == "cmpl-ä-0-0123abcd"
    assert record["prompt_tokens"] == 30
    assert record["routes"].tolist() == [1, 0, -1, 1]
    np.testing.assert_array_equal(
        record["full_probability"], np.array([0.75, 0.25, math.nan, 3], np.float32)
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("limit", [1, 5, 8, 100])
def test_the_latest_are_kept_newest_first(tmp_path: Path, count: int, limit: int) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L, capacity=8)
    for number in range(1, count + 1):
        append(journal, number)
    found = only(tmp_path, limit)
    expected = list(range(count, 0, -1))[: min(limit, 8)]
    assert numbers(found) == expected
    assert found.records["request_id"].tolist() == [b"request-%d" % n for n in expected]


def test_no_field_survives_from_the_record_before(tmp_path: Path) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L, capacity=1)
    append(journal, 1, "a-long-request-id")
    append(journal, 2, "short")
    assert only(tmp_path).records["request_id"].tolist() == [b"short"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("x" * REQUEST_ID_BYTES, b"x" * REQUEST_ID_BYTES),
        ("x" * (REQUEST_ID_BYTES + 1), b""),
        ("ä" * REQUEST_ID_BYTES, b""),
    ],
    ids=["fits", "too long", "too long in bytes"],
)
def test_an_id_that_does_not_fit_is_not_cut(tmp_path: Path, name: str, kept: bytes) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L)
    append(journal, 1, name)
    assert only(tmp_path).records["request_id"].tolist() == [kept]


@pytest.mark.parametrize("field", list(record_dtype(L).names))
def test_a_record_that_is_half_written_is_passed_over(tmp_path: Path, field: str) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L, capacity=4)
    for number in range(1, 4):
        append(journal, number)
    file = ring_file(tmp_path)
    dtype = record_dtype(L)
    start = file.stat().st_size - 4 * dtype.itemsize
    data = bytearray(file.read_bytes())
    data[start + dtype.itemsize + dtype.fields[field][1]] ^= 1  # of the second record
    with file.open("r+b") as out:
        out.write(data)
    assert numbers(only(tmp_path)) == [3, 1]


def test_reading_while_another_process_writes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        seen = set()
        for _ in range(2000):
            for record in only(tmp_path).records:
                number = int(record["number"])
                seen.add(number)
                assert record["prompt_tokens"] == number
                assert record["request_id"].decode() == str(number) * 8
                assert set(record["routes"].tolist()) == {number % 2}
                assert set(record["full_probability"].tolist()) == {float(number)}
        writer.kill()
    assert len(seen) > 100


def test_a_killed_worker_is_not_live(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert only(tmp_path).is_live
        writer.send_signal(signal.SIGKILL)
    found = only(tmp_path)
    assert not found.is_live
    assert found.about == {"model_name": "m"}
    assert len(found.records) == 0


def test_a_new_worker_clears_away_the_dead_alone(tmp_path: Path) -> None:
    first, second = (RouteJournal(tmp_path, {"model_name": name}, L) for name in "ab")
    append(second, 1)
    del first
    assert [w.is_live for w in read_journals(tmp_path, 10)].count(False) == 1
    third = RouteJournal(tmp_path, {"model_name": "c"}, L + 1)
    found = read_journals(tmp_path, 10)
    assert sorted(w.about["model_name"] for w in found) == ["b", "c"]
    assert all(w.is_live for w in found)
    assert len({w.name for w in found}) == 2
    assert sum(len(w.records) for w in found) == 1
    del third


def test_readers_do_not_take_each_others_lock_for_a_worker(tmp_path: Path) -> None:
    journal = RouteJournal(tmp_path, ABOUT, L)
    file = ring_file(tmp_path)
    del journal
    reader = (
        "import fcntl, sys; f = open(sys.argv[1], 'rb'); fcntl.flock(f, fcntl.LOCK_SH); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reader, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert not only(tmp_path).is_live
        other.communicate()


def test_a_file_is_seen_only_when_complete(tmp_path: Path, monkeypatch) -> None:
    def full_disk(*args: object) -> None:
        assert read_journals(tmp_path, 10) == []
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(OSError, match="No space left"):
        RouteJournal(tmp_path, ABOUT, L)
    assert read_journals(tmp_path, 10) == []


def test_prometheus_does_not_read_the_file(tmp_path: Path) -> None:
    from flux_vllm.metrics.directory import FluxCollector

    journal = RouteJournal(tmp_path, ABOUT, L)
    append(journal, 1)
    assert FluxCollector(str(tmp_path)).collect() == []
