"""Configurations: what is understood, and where and how each mistake is reported."""

from pathlib import Path

import pytest

from kvsieve import UserError
from kvsieve.compare import config


def mistakes(write, text, overrides=None):
    """The reported mistakes without the folder of the file."""
    path = write(text, with_model=False)
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


BAD = """\
    modle: reference
    seed: 3
    seed: 4
    batch_size: 0
    tasks:
      - needle: {context: [512, lots], samples: 0}
      - nedle
      - perplexity:
        context: 3
    policies:
      - dense: {compression: 2}
      - sparq: {rr: 3, group_score: soft}
      - h2o: {budget: "16"}
      - local_window: {budget: true}
      - dense_layers: {layers: [0, a], inner: {sparc: {r: 3}}}
      - dense_layers: {layers: 1}
    """


def test_all_mistakes_are_reported_at_once_each_in_its_place(write):
    found = mistakes(write, BAD)
    expected = [
        ("test.yaml:1:1: model is missing", ""),
        ("test.yaml:1:8: modle: unknown key 'modle'", "did you mean 'model'? Legal: batch_size"),
        ("test.yaml:3:1: seed: this key is already given in line 2", ""),
        ("test.yaml:4:13: batch_size: ", "must be an integer from 1 to 65536 or 'auto' (got 0)"),
        ("test.yaml:6:5: tasks.0.needle: samples must be at least 1, not 0", ""),
        ("test.yaml:6:29: tasks.0.needle.context.1: ", "must be an integer (got 'lots')"),
        (
            "test.yaml:7:5: tasks.1: unknown task 'nedle'",
            "did you mean 'needle'? Legal: cnn_dailymail, conversation, key_value",
        ),
        ("test.yaml:8:5: tasks.2: ", "(indent its parameters below it)"),
        ("test.yaml:11:26: policies.0.dense.compression: ", "up to 1, such as 1/8 (got 2)"),
        ("test.yaml:12:17: policies.1.sparq.rr: unknown parameter of sparq 'rr'", "Legal: "),
        ("test.yaml:12:33: policies.1.sparq.group_score: ", "'softmax' or 'logits' (got 'soft')"),
        ("test.yaml:13:19: policies.2.h2o.budget: ", "must be an integer (got '16')"),
        ("test.yaml:14:28: policies.3.local_window.budget: ", "must be an integer (got True)"),
        ("test.yaml:15:32: policies.4.dense_layers.layers.1: ", "must be an integer (got 'a')"),
        ("test.yaml:15:44: policies.4.dense_layers.inner.sparc: unknown policy 'sparc'", "'sparq'?"),
        ("test.yaml:16:5: policies.5.dense_layers.inner: must be given", ""),
        ("test.yaml:16:28: policies.5.dense_layers.layers: ", "(got 1)"),
    ]
    assert len(found) == len(expected), "\n".join(found)
    for line, (start, rest) in zip(found, expected, strict=True):
        assert line.startswith(start), (line, start)
        assert rest in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- dense", "is not a mapping"),
        ("model: [", "test.yaml:1:9: not YAML"),
        ("model: !!python/name:os.system x",
         "test.yaml:1:8: model: tags such as !!python/name:os.system are not read"),
        ("tasks: &a [*a]", "an alias that contains itself"),
        ("model: reference\ntasks: []\npolicies: [dense]",
         "tasks: must be a list of values, not empty (got [])"),
        ("model: reference\ntasks: [needle]\npolicies: [sparq: {r: []}]",
         "an empty list sweeps over nothing"),
        ("model: reference\ntasks: [needle]\npolicies: [sparq: 3]", "are `key: value` pairs (got 3)"),
        ("model: reference\ntasks: [needle]\n"
         "policies: [{dense_layers: {layers: [0], inner: dense, compression: 1}}]",
         "cannot be asked for a compression; its parameters: layers, inner"),
    ],
)  # fmt: skip
def test_a_file_that_says_nothing_usable(write, text, message):
    assert message in "\n".join(mistakes(write, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read: No such file"):
        config.load(tmp_path / "nowhere.yaml")


def test_a_value_that_the_class_refuses_is_a_mistake_of_its_entry(write):
    text = "model: reference\ntasks: [needle]\npolicies:\n  - sparq: {k: 0}\n"
    (line,) = mistakes(write, text)
    assert line.startswith("test.yaml:4:5: policies.0.sparq: sparq.k must be at least 1")


def test_a_list_is_a_sweep(load):
    found = load("""\
        tasks: [needle: {context: [64, 128], samples: 2}, repetition]
        policies: [dense, sparq: {compression: [1/2, 0.125], local: [4, 8]}]
        """)
    assert [(task.name, task.context) for task, _ in found.tasks] == [
        ("needle", 64), ("needle", 128), ("repetition", 1024),
    ]  # fmt: skip
    sparq = found.policies[1:]
    assert [(str(p.budget), p.parameters) for p in sparq] == [
        (ratio, {"local": local}) for local in (4, 8) for ratio in ("1/2", "1/8")
    ]


def test_compression_and_explicit_parameters_combine(load):
    found = load("""\
        tasks: [needle]
        policies: [sparq: {compression: 1/8, local: 3}, sparq: {compression: 1/8}]
        """)
    given, plain = (choice.build(head_size=64, context=1024) for choice in found.policies)
    assert given.local == 3
    assert (given.r, given.k) == (plain.r, plain.k) == (8, 64)


def test_nested_policies_sweep_too_and_a_list_field_is_no_sweep(load):
    found = load("""\
        tasks: [needle]
        policies: [dense_layers: {layers: [0, 1], inner: [h2o, sparq: {compression: [1/8, 1/4]}]}]
        """)
    built = [choice.build(head_size=64, context=1024) for choice in found.policies]
    assert [policy.layers for policy in built] == [(0, 1)] * 3
    assert [policy.inner.name for policy in built] == ["h2o", "sparq", "sparq"]
    assert [policy.inner.k for policy in built[1:]] == [64, 128]


def test_what_is_resolved_reads_back_as_the_same(load, write):
    text = """\
        seed: 5
        tasks: [needle: {context: [64, 128], samples: 2}, perplexity: {tokens: 9}]
        policies:
          - dense
          - h2o: {budget: [64, 32], recent: 8}
          - dense_layers: {layers: [0], inner: {sparq: {compression: [1/8, 1/4]}}}
        """
    first = load(text)
    again = load(first.resolved(dtype="bfloat16"), with_model=False, name="again.yaml")
    assert [task for task, _ in again.tasks] == [task for task, _ in first.tasks]
    assert again.policies == first.policies
    assert again.settings.seed == 5
    assert again.settings.dtype == "bfloat16"


def test_overrides(write):
    path = write("tasks: [needle: {samples: 9}]\npolicies: [dense]\n")
    changed = config.load(path, ["tasks.0.needle.samples=4", "seed=7", "tasks.0.needle.context=[64, 96]"])
    assert [(task.samples, task.context) for task, _ in changed.tasks] == [(4, 64), (4, 96)]
    assert changed.settings.seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: write it as path.to.key=value"),
        ("tasks.3.needle=1", "no '3' here; there are items 0 to 0"),
        ("polices.0=dense", "no 'polices' here; there is: model, tasks, policies"),
        ("seed=[", "'[' is not YAML"),
        ("seed=x", "--set seed=x: seed: must be an integer from 0 to 9223372036854775807 (got 'x')"),
        ("tasks.0.needle.samples=0", "tasks.0.needle: samples must be at least 1"),
    ],
)
def test_a_wrong_override_names_itself(write, override, message):
    path = write("tasks: [needle: {samples: 9}]\npolicies: [dense]\n")
    with pytest.raises(UserError) as caught:
        config.load(path, [override])
    assert message in str(caught.value)


def test_the_shipped_configurations_are_right():
    found = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json\n")
        if path.stem != "my_policy":  # names a policy of the example package, which need not be installed
            config.load(path)


def test_a_misspelt_section_does_not_hide_the_mistakes_beneath_it(write):
    text = "model: reference\ntasks: [needle]\npolices:\n  - sparq: {kk: 3}\n"
    assert [line.split(": ", 2)[1:] for line in mistakes(write, text)] == [
        ["policies is missing"],
        ["polices", "unknown key 'polices'; did you mean 'policies'? Legal: "
         + ", ".join(sorted(config.Settings.model_fields))],
        ["polices.0.sparq.kk", "unknown parameter of sparq 'kk'; did you mean 'k'? Legal: "
         "block, compression, group_score, k, layout, local, mean_value, mean_value_limit, r, tokens"],
    ]  # fmt: skip


def test_what_is_listed_twice_is_measured_once_and_said(load):
    found = load("""\
        tasks: [needle, needle: {context: 1024}]
        policies:
          - sparq
          - sparq: {k: [128, 64, 64]}
          - sparq: {compression: 1/8}
          - sparq: {compression: 0.125}
        """)
    assert len(found.tasks) == 1
    assert len(found.policies) == 3
    assert [line.partition("test.yaml:")[2] for line in found.remarks] == [
        "2:17: tasks.1.needle: the same as tasks.0; it is measured once",
        "5:5: policies.1.sparq: the same as policies.0; it is measured once",
        "5:5: policies.1.sparq: its lists make the same one twice; it is measured once",
        "7:5: policies.3.sparq: the same as policies.2.sparq; it is measured once",
    ]
