"""Flipped bits and odd lines in samples.jsonl: each is noticed, and its sample measured again, or is
harmless.
"""

import json
import random

import pytest
from tests.reliability import record

from kvsieve.compare import samples, summary
from kvsieve.compare.samples import Store

CONFIG = """\
    batch_size: 2
    tasks:
      - needle: {context: 120, samples: 6}
      - perplexity: {context: 120, samples: 4, tokens: 8}
    policies: [dense, sparq: {compression: 1/4}]
    """


def keys(records):
    return {(record["cell"], record["sample"]) for record in records}


@pytest.mark.parametrize("flips", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_noticed_or_harmless(compare, flips):
    folder = compare(CONFIG).folder
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    asked, expected = keys(samples.read(path)), summary.write(folder)
    generator = random.Random(0)
    noticed = 0
    for _ in range(flips):
        place, bit = generator.randrange(len(whole)), generator.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        found = keys(samples.read(path))
        if found < asked:  # the sample is missing, and is measured again
            noticed += 1
        else:
            assert found == asked
            assert summary.write(folder) == expected, (place, bit)
    assert noticed > 0.9 * flips
    if flips > 200:
        record("bits flipped in samples.jsonl", f"{flips:,}")
        record("flipped bits that were noticed", f"{noticed:,} of {flips:,}")
        record("flipped bits that changed a summary unseen", f"0 of {flips:,}")


def test_a_damaged_sample_is_measured_again(compare):
    folder = compare(CONFIG).folder
    path = folder / "samples.jsonl"
    before = samples.read(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0].replace(b'"score": 0.0', b'"score": 1.0'), *lines[1:]]))
    assert path.read_bytes().split(b"\n")[0] != lines[0]
    assert compare(CONFIG).failures == {}
    after = samples.read(path)
    assert len(after) == len(before)
    assert {(r["cell"], r["sample"], r["score"]) for r in after} == {
        (r["cell"], r["sample"], r["score"]) for r in before
    }


def good():
    shares = dict.fromkeys(("steps", "bytes_read", "bytes_written", "bytes_dense", "kv_bytes"), 1.0)
    texts = {"answer": "a", "reference": "b"}
    return {"cell": "x", "sample": 0, "score": 1.0, **texts, **shares, "tokens_per_second": [1.0, 2.0]}


@pytest.mark.parametrize("field", good())
def test_a_line_without_a_field_is_skipped(tmp_path, field):
    path = tmp_path / "samples.jsonl"
    line = good()
    del line[field]
    path.write_text(json.dumps(line) + "\n" + json.dumps(good()) + "\n")
    assert samples.read(path) == [good()]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cell", 1), ("cell", None), ("sample", -1), ("sample", 1.5), ("sample", True), ("sample", "0"),
        ("score", "1"), ("score", None), ("score", float("nan")), ("score", float("inf")), ("score", True),
        ("answer", None), ("reference", 3), ("steps", []), ("bytes_read", float("-inf")),
        ("kv_bytes", "12"), ("tokens_per_second", "fast"), ("tokens_per_second", [1.0, None]),
        ("tokens_per_second", float("nan")),
    ],
)  # fmt: skip
def test_a_line_with_a_wrong_value_is_skipped(tmp_path, field, value):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(good() | {field: value}) + "\n" + json.dumps(good()) + "\n")
    assert samples.read(path) == [good()]


@pytest.mark.parametrize("line", [b"[]", b"3", b"null", b"", b"\xff\xfe", b"[" * 100_000, b'{"cell": 1' * 99])
def test_a_line_that_is_no_record_is_skipped(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    with Store(path) as store:
        store.append([good()])
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert samples.read(path) == [good()]


def test_lines_of_version_0_1_are_read(tmp_path):
    path = tmp_path / "samples.jsonl"
    old = good() | {"tokens_per_second": 3.5, "ran_eagerly": "it looks"}
    path.write_text(json.dumps(old) + "\n")
    assert samples.read(path) == [old]


def test_every_line_ends_with_its_checksum(tmp_path):
    path = tmp_path / "samples.jsonl"
    odd = good() | {"answer": '", "crc32": "00000000"}\n\ud800 ü'}
    with Store(path) as store:
        store.append([odd, good() | {"sample": 1}])
    (first, _) = samples.read(path)
    assert first["answer"] == '", "crc32": "00000000"}\n? ü'
    assert all(b'"crc32": "' in line for line in path.read_bytes().splitlines())
