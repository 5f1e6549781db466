"""Configurations that a hostile or hurried hand wrote: each is refused with a message, in its place."""

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve import UserError
from kvsieve.compare import config
from kvsieve.compare.run import compare
from kvsieve.compare.yaml_source import read_value, unquoted


def mistakes(write, text):
    """The reported mistakes without the folder of the file."""
    path = write(text, with_model=False)
    with pytest.raises(UserError) as caught:
        config.load(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


START = "model: reference\ntasks: [needle]\npolicies:\n"
BOMB = "".join(f"{new}: &{new} [{f'*{old}, ' * 9}]\n" for old, new in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (START + "- sparq: {k: 2001-99-99}",
         "test.yaml:4:14: policies.0.sparq.k: must be an integer (got '2001"),
        (START + "- sparq: {k: 0b_}", "must be an integer (got '0b_')"),
        (START + "- sparq: {k: 010}", "must be an integer (got '010')"),
        (START + "- sparq: {k: !!int x}",
         "test.yaml:4:14: policies.0.sparq.k: tags such as !!int are not read"),
        (START + "- sparq: {k: " + "9" * 50 + "}",
         "test.yaml:4:14: policies.0.sparq.k: a number of more than 19"),
        (START + "- sparq: {k: " + "9" * 5000 + "}", "test.yaml:4:14: a text of more than 4096 characters"),
        (START + "- " + "[" * 500, "test.yaml:4:34: values are nested deeper than 32"),
        ("a: &a [" + "x, " * 9 + "]\n" + BOMB + START,
         "more than 20000 keys and values, those that aliases repeat"),
        (START + "- sparq: {compression: 1e-999999999}", "such as 1/8 (got '1e-999999999')"),
        (START + f"- sparq: {{k: {list(range(40, 440))}, r: {list(range(1, 300))}}}",
         "test.yaml:4:3: policies.0.sparq: its lists make more than 1000 combinations"),
        (START + "- dense\n" * 7000, "test.yaml:1004:3: policies.1000: up to this entry, with its sweeps, "),
        (f"model: x\ntasks: [needle: {{samples: {list(range(1, 201))}}}]\n"
         f"policies: [sparq: {{local: 1, k: {list(range(1, 201))}}}]",
          "200 tasks x 200 policies are more than 10000"),
        ("#" * (1 << 17), "test.yaml: is larger than 64 KiB"),
        (START + "- {1: {k: 3}, true: 2}", "test.yaml:4:3: policies.0: a policy is a name or one name"),
        ("true: 1\n2: x\n" + START, "test.yaml:1:7: true: unknown key 'true'"),
        (START + "- sparq: {[1]: 2}", "test.yaml:4:11: policies.0.sparq: a key is a word, not a list"),
        (START + "- sparq: {<<: {k: 3}}",
         "test.yaml:4:11: policies.0.sparq.<<: merge keys (<<) are not read"),
        (START + "- dense\n---\nmodel: x", "test.yaml:5:1: a second document begins here (---)"),
        ('model: "\\uD800"', "test.yaml:1:8: model: holds half of a character"),
        ("model: a\x01b", "test.yaml:1:9: not YAML: the character U+0001 is not allowed"),
        ("model: " + "x" * 300, "test.yaml:1:8: model: has a name of more than 255 bytes"),
        ('model: "a\\0b"', "model: holds the character U+0000"),
        ("seed: 9223372036854775808", "seed: an integer of more than 64 bits (got 9223372036854775808)"),
        (START.replace("needle", "needle: {samples: 1000000000}"),
         "samples must be at most 1000000, not 1000000000"),
        (START.replace("needle", "needle: {text: /dev/zero}"),
         "text: /dev/zero: cannot be read: it is not a regular"),
        (START.replace("needle", "needle: {text: 3}"),
         "needle.text: must be text or null: put it in quotes (got 3)"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_in_its_place(write, text, message):
    assert message in "\n".join(mistakes(write, text))


def test_decimal_digits_are_a_number_and_all_else_is_text():
    numbers = "1 -1 +1 0 1.5 1e3 .5 1. true null ~ .inf"
    values = [1, -1, 1, 0, 1.5, 1000.0, 0.5, 1.0, True, None, None, float("inf")]
    assert [unquoted(text) for text in numbers.split()] == values
    for text in ["010", "0x10", "0b1", "1_000", "1:30", "yes", "2001-01-01", "1e999", "12e4567", "1e-999"]:
        assert unquoted(text) == text


AMBIGUOUS = [
    "1e5",
    "12e3456",
    "yes",
    "010",
    "null",
    "0x1",
    "1:30",
    "2001-01-01",
    "1_0",
    "=",
    "<<",
    ".5",
    "1.e3",
    ".nan",
]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(TEXTS | st.sampled_from(AMBIGUOUS))
def test_a_text_in_the_resolved_file_is_read_as_that_text(text):
    assert read_value("it", config.dump({"text": text}))["text"] == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"model: reference\nseed: \xe9\n", ":2:7: is not UTF-8 text (byte 0xe9): save it as UTF-8"),
        ("model: reference".encode("utf-16"), ":1:1: is not UTF-8 text (byte 0xff)"),
    ],
)
def test_a_file_in_another_encoding_is_refused_at_its_first_byte(tmp_path, data, message):
    path = tmp_path / "latin.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        config.load(path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_text(START + "- dense\n", encoding="utf-8-sig")
    assert config.load(path).settings.model == "reference"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_and_a_device_are_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(UserError, match="it is not a regular file"):
            config.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policies.0=!!int x", "tags such as !!int are not read"),
        ("policies.0=" + "[" * 100, "values are nested deeper than 32"),
        ("policies.0={sparq: {k: true}}",
         "--set policies.0={sparq: {k: true}}: policies.0.sparq.k: must be an int"),
        ("seed=" + "9" * 30, "a number of more than 19 digits"),
        ("tasks.0.needle.text=/dev/zero", "it is not a regular file"),
        ("trust_remote_code=true", "give --trust-remote-code on the command line, too"),
    ],
)  # fmt: skip
def test_an_override_goes_through_the_same_checks(write, override, message):
    path = write("tasks: [needle: {samples: 9}]\npolicies: [dense]\n")
    with pytest.raises(UserError) as caught:
        config.load(path, [override])
    assert message in str(caught.value)


def test_a_file_alone_cannot_run_code(write):
    text = "trust_remote_code: true\ntasks: [lm_eval: {task: x, include_path: .}]\npolicies: [dense]\n"
    first, second = mistakes(write, "model: reference\n" + text)
    assert first.startswith("test.yaml:2:20: trust_remote_code: runs code that comes with the checkpoint")
    assert "--trust-remote-code" in first
    assert second.startswith(
        "test.yaml:3:42: tasks.0.lm_eval.include_path: tasks in a folder of their own run code"
    )
    assert "--trust-task-code" in second
    found = config.load(write(text), trust_remote_code=True, trust_task_code=True)
    assert found.settings.trust_remote_code


def test_a_text_in_the_run_s_own_folder_is_refused(load, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    found = load(f"tasks: [perplexity: {{text: {tmp_path}/link/samples.jsonl}}]\npolicies: [dense]\n")
    with pytest.raises(
        UserError, match=r"test.yaml:2:28: tasks.0.perplexity.text: lies in the run's own folder"
    ):
        compare(found, tmp_path / "run")
    found.check_output(tmp_path / "elsewhere")
