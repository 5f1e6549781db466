"""samples.jsonl survives what may happen to it."""

import resource
import signal

import pytest

from kvsieve import UserError
from kvsieve.compare import samples
from kvsieve.compare.samples import Store


def record(sample, cell="a", score=1.0):
    shares = dict.fromkeys(("steps", "bytes_read", "bytes_written", "bytes_dense", "kv_bytes"), 1.0)
    texts = {"answer": "a", "reference": "b"}
    return {"cell": cell, "sample": sample, "score": score, **texts, **shares, "tokens_per_second": None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "samples.jsonl"


def test_what_was_appended_is_there_again(path):
    with Store(path) as first:
        first.append([record(0), record(2)])
        first.append([record(0, cell="b")])
    with Store(path) as second:
        assert second.missing("a", 4) == [1, 3]
        assert second.missing("b", 1) == []
        assert second.missing("c", 1) == [0]


@pytest.mark.parametrize("torn", ['{"cell": "a", "sam', '{"cell": "a", "sample": 1, "score": 1.0}', "\0\0\0"])
def test_a_torn_last_line_is_dropped(path, torn):
    with Store(path) as first:
        first.append([record(0)])
    with path.open("a") as file:
        file.write(torn)
    assert len(samples.read(path)) == 1
    with Store(path) as second:
        assert second.missing("a", 2) == [1]
        second.append([record(1)])
    assert path.read_text().count("\n") == 2
    assert [r["sample"] for r in samples.read(path)] == [0, 1]


def test_a_damaged_line_costs_only_itself(path):
    with Store(path) as first:
        first.append([record(0), record(1)])
    path.write_text('{"cell": "a"}\nnonsense\n' + path.read_text())
    with Store(path) as second:
        assert second.missing("a", 3) == [2]


def test_a_second_run_in_the_folder_is_refused(path):
    with Store(path), pytest.raises(UserError, match="another run is writing here"):
        Store(path)
    with Store(path):
        pass


def test_a_full_disk_is_reported_and_loses_nothing(path):
    with Store(path) as full:
        full.append([record(0)])
        size = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, limits[1]))
            with pytest.raises(
                UserError, match="cannot write: .* 1 samples measured so far are safe; make room"
            ):
                full.append([record(i) for i in range(1, 5)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert path.stat().st_size == size
        full.append([record(1)])
    assert [r["sample"] for r in samples.read(path)] == [0, 1]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "samples.jsonl")
