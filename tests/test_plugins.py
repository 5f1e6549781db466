"""The door for outside policies: discovery, broken plugins, and errors that list what is legal."""

import concurrent.futures
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import kvsieve
from kvsieve import UserError, make_policy, plugins
from tests.broken_plugins import BROKEN
from tests.conftest import lay_out
from tests.reliability import record

POLICY = """
from dataclasses import dataclass
import kvsieve

@dataclass(frozen=True)
class First(kvsieve.Policy):
    "Reads the first n tokens."
    n: int = 4
    name = "first_tokens"
    paper = "none"

@kvsieve.hookimpl
def register_policies(register):
    register(First)
"""


def test_the_builtin_policies_enter_through_the_door():
    found = plugins.policies()
    assert {"dense", "sparq", "h2o", "local_window", "dense_layers"} <= set(found)
    assert found["sparq"].distribution == "kvsieve"
    assert found["sparq"].version == kvsieve.__version__
    assert all(one.builtin for one in (*found.values(), *plugins.tasks().values()))
    assert not plugins.problems()


def test_an_outside_policy_is_found_with_its_origin(install):
    install("outsider", POLICY, version="2.5")
    entry = plugins.policies()["first_tokens"]
    assert (entry.distribution, entry.version) == ("outsider", "2.5")
    assert make_policy("first_tokens", n=7).n == 7


def test_a_plugin_named_as_ours_is_a_stranger_and_replaces_nothing(install):
    install("evil", POLICY.replace("first_tokens", "sparq"), point="builtin")
    assert plugins.policies()["sparq"].cls.__module__ == "kvsieve_policies.sparq"
    (problem,) = plugins.problems()
    assert problem.startswith("plugin 'builtin' of evil 1.0 (evil): 'sparq' is already registered by kvsieve")
    install("evil_too", POLICY, point="builtin_tasks")
    found = plugins.policies()["first_tokens"]
    assert (found.plugin, found.distribution, found.builtin) == ("builtin_tasks", "evil_too", False)
    assert {name for name, one in plugins.policies().items() if not one.builtin} == {"first_tokens"}


def test_a_module_with_the_name_of_ours_that_was_imported_before_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "kvsieve_policies.py").write_text(POLICY.replace("first_tokens", "sparq"))
    monkeypatch.delitem(sys.modules, "kvsieve_policies")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("kvsieve_policies")
    plugins.reload()
    try:
        assert plugins.policies() == {}
        (problem,) = plugins.problems()
        assert f"kvsieve_policies was imported from {tmp_path}" in problem
    finally:
        plugins.reload()


def test_a_broken_plugin_is_reported_and_takes_nothing_down(install):
    install("aaa_broken", "raise SystemExit(4)")
    install("zzz_good", POLICY.replace("first_tokens", "good"))
    assert {"sparq", "h2o", "good"} <= set(plugins.policies())
    (problem,) = plugins.problems()
    assert problem == "plugin 'aaa_broken' of aaa_broken 1.0 (aaa_broken): SystemExit: 4"
    with pytest.raises(UserError, match="not loaded: plugin 'aaa_broken'"):
        make_policy("first_tokens")


@pytest.mark.figures
def test_forty_broken_plugins_are_each_named_and_leave_the_built_in_policies(tmp_path):
    """In one process of its own, so that one may end it, and so that each meets all others."""
    for plugin in BROKEN:
        name, fill = plugin.name, functools.partial(str.format, name=plugin.name)
        code = plugin.code.replace("NAME", name)
        lay_out(tmp_path, name, code, fill(plugin.entry_points), fill(plugin.metadata))
    lay_out(
        tmp_path,
        "z_good",
        "print('plugin says hello')\n" + POLICY.replace("first_tokens", "good"),
        "[kvsieve]\nz_good = z_good\n",
        "Metadata-Version: 2.1\nName: z_good\nVersion: 1.0\n",
    )
    (tmp_path / "kvsieve_policies.py").write_text("raise SystemExit('not the built-in policies')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "kvsieve", "policies"]
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "80"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "hello" not in done.stdout
    listed = re.findall(r"^(\w+)  \((.*?)[,)]", done.stdout, re.MULTILINE)
    ours = [name for name, found in plugins.policies().items() if found.builtin]
    assert {"dense", "sparq", "h2o", "local_window", "dense_layers"} <= set(ours)
    assert listed[: len(ours)] == [(name, f"kvsieve {kvsieve.__version__}") for name in ours]
    # These two are reported and offer a sound class all the same.
    assert {name for name, _ in listed[len(ours) :]} == {"b_twice", "good"}
    problems = [
        line.removeprefix("not loaded: ") for line in done.stderr.splitlines() if "not loaded" in line
    ]
    for plugin in BROKEN:
        about = [line for line in problems if re.search(rf"\b{plugin.name}\b", line)]
        assert len(about) == 1, (plugin.name, about)
        assert re.search(plugin.reason, about[0]), about[0]
    assert len(problems) == len(BROKEN)
    assert max(map(len, problems)) <= 500
    record(
        "plugin packages, each broken in a way of its own: named with the reason, nothing else down",
        len(problems),
    )


def test_a_refused_class_does_not_take_the_plugins_others(install):
    classes, register = POLICY.split("@kvsieve")
    second = classes.replace("First", "Second").replace("first_tokens", "second")
    register = register.replace("(First)", "(Second); register(First)")
    install("mixed", classes + second.replace("n: int", "n: object") + "@kvsieve" + register)
    assert "first_tokens" in plugins.policies()
    assert "second" not in plugins.policies()
    (problem,) = plugins.problems()
    assert "Second.n is annotated" in problem


def test_a_plugin_that_fails_after_registering_is_taken_out_whole(install):
    install("late", POLICY.replace("register(First)", "register(First)\n    raise KeyboardInterrupt"))
    assert "first_tokens" not in plugins.policies()
    (problem,) = plugins.problems()
    assert problem.endswith(": KeyboardInterrupt")


def test_ctrl_c_is_the_users_and_is_not_swallowed(install):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    install(
        "slow_to_import",
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**6): pass",
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        plugins.policies()
    assert signal.getsignal(signal.SIGINT) is before


def test_plugins_are_discovered_outside_of_the_main_thread_too(install):
    install("aaa_broken", "raise KeyboardInterrupt")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert "sparq" in pool.submit(plugins.policies).result()
    assert len(plugins.problems()) == 1


def test_an_exception_while_a_policy_is_made_names_the_policy(install):
    body = "    def __post_init__(self):\n        raise RuntimeError('no room for n')\n"
    install("strict", POLICY.replace("    name = ", body + "    name = "))
    with pytest.raises(UserError, match="first_tokens: RuntimeError: no room for n"):
        make_policy("first_tokens", n=3)


HOOKS = """
import json, pathlib
import kvsieve

@kvsieve.hookimpl
def run_started(folder, cells):
    pathlib.Path(folder, "NAME_started.txt").write_text(str(len(cells)))
    cells.clear()

@kvsieve.hookimpl
def run_finished(folder, summary):
    pathlib.Path(folder, "NAME_finished.txt").write_text(json.dumps(summary))
    summary.clear()
    FAIL
"""


def test_run_hooks_of_every_plugin_are_called_with_copies_and_may_fail(install, tmp_path):
    for name, fail in [("first", "raise SystemExit(9)"), ("second", "")]:
        install(name, HOOKS.replace("NAME", name).replace("FAIL", fail))
    cells, summary = ["a", "b"], [{"score": 1}]
    assert plugins.tell("run_started", folder=tmp_path, cells=cells) == []
    (failed,) = plugins.tell("run_finished", folder=tmp_path, summary=summary)
    assert failed == "plugin 'first' of first 1.0 (first) failed in run_finished: SystemExit: 9"
    for name in ("first", "second"):
        assert (tmp_path / f"{name}_started.txt").read_text() == "2"
        assert json.loads((tmp_path / f"{name}_finished.txt").read_text()) == summary
    assert (cells, summary) == (["a", "b"], [{"score": 1}])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "sparc",
            {},
            "unknown policy 'sparc'; did you mean 'sparq'. Legal: .*dense, dense_layers, .*h2o, "
            ".*local_window, .*sparq",
        ),
        (
            "sparq",
            {"rank": 3},
            "unknown parameter of sparq 'rank'; .*Legal: .*group_score, k, .*local, mean_value, .*r",
        ),
        ("sparq", {"k": "many"}, "sparq.k: .*integer.*'many'"),
        ("sparq", {"k": 0}, "sparq.k must be at least 1, not 0"),
        ("sparq", {"k": 8, "local": 9}, "sparq.local must be from 0 to k = 8, not 9"),
        ("sparq", {"group_score": "mean"}, "sparq.group_score: .*'softmax' or 'logits'.*'mean'"),
        ("h2o", {"budget": 4, "recent": 5}, "h2o.recent must be from 1 to budget = 4, not 5"),
        (
            "local_window",
            {"budget": 4, "sinks": 4},
            "local_window.sinks must be from 0 to budget - 1 = 3, not 4",
        ),
        ("local_window", {"budget": 0}, "local_window.budget must be at least 1 token, not 0"),
        ("dense_layers", {"layers": [0]}, "dense_layers.inner: must be given"),
        ("dense_layers", {"layers": [0], "inner": {"spark": {}}}, "unknown policy 'spark'"),
        (
            "dense_layers",
            {"layers": [0], "inner": {"h2o": {"budgett": 1}}},
            "unknown parameter of h2o 'budgett'",
        ),
    ],
)
def test_mistakes_are_answered_with_what_is_legal(name, parameters, message):
    with pytest.raises(UserError, match=message):
        make_policy(name, **parameters)
