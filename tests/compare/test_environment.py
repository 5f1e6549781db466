"""How busy a machine was while it measured, and when its speeds are not to be quoted."""

import re
import subprocess

import psutil
import pytest

from kvsieve.compare import environment
from kvsieve.compare.environment import Load


@pytest.mark.parametrize(
    ("steal", "others", "why"),
    [
        (1.0, 4.0, None),
        (6.0, 0.0, "other processes had 0% of the cores' time, other guests of the host 6%"),
        (1.0, 30.0, "other processes had 30% of the cores' time, other guests of the host 1%"),
    ],
)
def test_above_a_twentieth_of_the_cores_time_for_others_a_speed_is_marked(monkeypatch, steal, others, why):
    start = psutil.cpu_times()._replace(**dict.fromkeys(psutil.cpu_times()._fields, 0.0))
    end = start._replace(user=50.0 + others, steal=steal, idle=50.0 - others - steal)
    times, own = iter([start, end]), iter([0.0, 50.0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    monkeypatch.setattr(environment, "_own_seconds", lambda: next(own))
    found = Load().since()
    assert found["not_to_be_quoted"] == why
    assert found["stolen"] == steal / 100


def test_the_commit_is_that_of_kvsieves_own_clone(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    other = tmp_path / "venv" / "kvsieve"
    other.mkdir(parents=True)
    (other / "environment.py").touch()
    (tmp_path / "own.txt").touch()
    who = "-c", "user.name=a", "-c", "user.email=a@b"
    git("add", "own.txt")
    git(*who, "commit", "-m", "theirs")
    assert environment.git_commit(other) is None  # it lies in another project's clone
    git("add", ".")
    git(*who, "commit", "-m", "ours")
    found = environment.git_commit(other)
    assert re.fullmatch("[0-9a-f]{12}", found)
    (tmp_path / "own.txt").write_text("edited")
    assert environment.git_commit(other) == found + "+"
