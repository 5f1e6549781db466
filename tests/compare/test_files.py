"""Files of a run folder are whole or untouched, and nothing but a regular file is read."""

import os
import resource

import pytest

from kvsieve import UserError
from kvsieve.compare import files


def test_a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "new" / "summary.csv"
    files.write(path, "one\n")
    files.write(path, b"two \xff\n")
    assert path.read_bytes() == b"two \xff\n"
    assert os.listdir(path.parent) == ["summary.csv"]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "summary.csv"
    files.write(path, "old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="summary.csv: cannot be written: No space left on device"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.csv"]


def test_a_file_that_grows_beyond_its_limit_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.csv"
    files.write(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            files.write(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"


def test_a_link_is_replaced_and_what_it_points_to_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "summary.csv").symlink_to(tmp_path / "mine")
    files.write(tmp_path / "summary.csv", "numbers")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "summary.csv").read_text() == "numbers"
    assert not (tmp_path / "summary.csv").is_symlink()


def test_what_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "summary.csv", tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot be written: "):
            files.write(path, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "summary.csv", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "summary.csv").stat().st_mode & 0o777 == 0o640


def test_a_lone_surrogate_does_not_lose_the_file(tmp_path):
    files.write(tmp_path / "summary.md", "a\ud800b")
    assert (tmp_path / "summary.md").read_text() == "a?b"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero", "nowhere"):
        with pytest.raises(UserError, match=f"{name}: cannot be read: "):
            files.read(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert files.read(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(UserError, match="it has 5 bytes, and 4 are allowed"):
        files.read(tmp_path / "link", limit=4)
