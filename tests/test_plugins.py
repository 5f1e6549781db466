"""The door for outside policies: discovery, isolation of broken plugins, and errors that list what is legal."""

import sys
from pathlib import Path

import pytest

import kvsieve
from kvsieve import UserError, make_policy, plugins

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_policy"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package on sys.path as an installer would leave it: its module beside a dist-info folder."""

    def put(name, code, version="1.0", entry=None):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[kvsieve]\n{name} = {entry or name}\n")
        plugins.reload()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    monkeypatch.undo()
    for module in [
        name for name, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))
    ]:
        del sys.modules[module]
    plugins.reload()


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
    assert not plugins.problems()


def test_an_outside_policy_is_found_with_its_origin(install):
    install("outsider", POLICY, version="2.5")
    entry = plugins.policies()["first_tokens"]
    assert (entry.distribution, entry.version) == ("outsider", "2.5")
    assert make_policy("first_tokens", n=7).n == 7


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("1 / 0", "ZeroDivisionError"),
        (POLICY.replace("(register)", "(registrar)", 1), "PluginValidationError"),
        (
            POLICY.replace('name = "first_tokens"', 'name = "sparq"'),
            "'sparq' is already registered by kvsieve",
        ),
        (POLICY.replace('    name = "first_tokens"\n', ""), "First needs a class attribute name"),
        (POLICY.replace("@dataclass(frozen=True)", "@dataclass"), "frozen"),
        (POLICY.replace("register(First)", "register(dict)"), "not a subclass of kvsieve.Policy"),
    ],
    ids=["import", "crash", "signature", "taken", "nameless", "not frozen", "not a policy"],
)
def test_a_broken_plugin_is_reported_and_takes_nothing_down(install, code, reason):
    install("aaa_broken", code)
    install("zzz_good", POLICY.replace("first_tokens", "good"))
    assert {"sparq", "h2o", "good"} <= set(plugins.policies())
    (problem,) = plugins.problems()
    assert "plugin 'aaa_broken' of aaa_broken 1.0" in problem
    assert reason in problem
    with pytest.raises(UserError, match="not loaded: plugin 'aaa_broken'"):
        make_policy("first_tokens")


def test_a_misspelt_hook_is_reported(install):
    install("misspelt", POLICY.replace("def register_policies", "def register_policy"))
    (problem,) = plugins.problems()
    assert "register_policy" in problem


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "sparc",
            {},
            "unknown policy 'sparc'; did you mean 'sparq'. Legal: .*dense, dense_layers, h2o, local_window, sparq",
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
        ("dense_layers", {"layers": [0]}, "dense_layers.inner must be given"),
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
