"""Thousands of broken configurations: each is read or refused with a message, quickly, in little memory."""

import random
import resource
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reliability import record

from kvsieve import UserError
from kvsieve.compare import config, fit

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SECONDS, MEGABYTES = 2.0, 300

# Of every kind that broke a reader of configurations once, and what a hurried or hostile hand writes.
TOKENS = [
    "2001-99-99", "0b_", "0x_", "!!int x", "!!python/object/apply:os.system [ls]", "!!binary x", "9" * 5000,
    "-" + "9" * 400, "1e-999999999", "1e999999999", ".nan", "-.inf", "0o9", "010", "1:30", "1_000",
    "~", "null",
    "yes", "true", "[" * 500, "{" * 500, "[" * 60 + "]" * 60, "- " * 300, "&a [*a]", "*nowhere", "<<: *a",
    "<<: {k: 3}", "? [k]\n: 3", "? {k: 3}\n: 3", "1: 2", "true: 2", "---\n", "...\n",
    "%YAML 1.9999999999999999999\n",
    '"\\uD800"', '"\\U0FFFFFFF"', '"\\x00"', "\x00", "\x85", "\u2028", "\ufeff", "\t", "'", '"', "|2\n  x",
    "compression: 1e-999999999", "compression: 1/0", "compression: [1/8, 1/8, x]", "samples: 1000000000",
    "context: 99999999999", "seed: 99999999999999999999", "trust_remote_code: true", "include_path: /",
    "text: /dev/zero", "text: /etc", "text: " + "a" * 300, "model: ~nobody-here/x", "model: " + "x" * 300,
    'model: "a\\0b"', "k: " + str(list(range(1200))), "layers: [" + "0, " * 300 + "0]", "x" * 5000,
    "#", ": ", ",",
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes, lines or tokens."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice([_change_bytes, _change_lines, _change_tokens])(data, rng)
    return data


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    at, kind = rng.randrange(len(data) + 1), rng.randrange(4)
    if kind == 0:
        return data[:at] + data[at + rng.randint(1, 8) :]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.randint(1, 3)) + data[at:]
    if kind == 2:
        return data[:at] + bytes([rng.choice(b"[]{}:,&*!|>%@`'\"#-? \n\t")]) + data[at:]
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _change_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    at, kind = rng.randrange(len(lines)), rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at:at] = [lines[at]] * rng.choice([1, 3, 200])
    elif kind == 2:
        lines[at] = b" " * rng.randint(1, 9) + lines[at].lstrip(b" ")
    elif kind == 3:
        rng.shuffle(lines)
    else:
        lines.insert(at, rng.choice(TOKENS).encode("utf-8", "surrogatepass") + b"\n")
    return b"".join(lines)


def _change_tokens(data: bytes, rng: random.Random) -> bytes:
    parts = data.split(b" ")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice(TOKENS).encode("utf-8", "surrogatepass") + rng.choice(
        [b"", b"]", b"}", b"\n", b","]
    )
    return b" ".join(parts)


def read(path: Path) -> tuple[bool, float]:
    """Whether a file was right, and the CPU seconds; anything but success or UserError is raised."""
    started = time.process_time()
    try:
        fit.check(config.load(path))
        right = True
    except UserError as error:
        assert str(error)
        assert len(str(error)) < 200_000
        right = False
    return right, time.process_time() - started


def read_many(tmp_path: Path, count: int, seed: int) -> tuple[int, float]:
    """Count mutated files that were right, and the longest time; a failing one is shown with its seed."""
    read(CONFIGS[0])  # imports what a command imports once
    originals = [path.read_bytes() for path in CONFIGS]
    path, accepted, worst = tmp_path / "mutated.yaml", 0, 0.0
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        path.write_bytes(mutated(rng.choice(originals), rng))
        try:
            right, seconds = read(path)
        except Exception as error:
            pytest.fail(
                f"file {i} of seed {seed}: {type(error).__name__}: {error}\n{path.read_bytes()[:2000]!r}"
            )
        accepted, worst = accepted + right, max(worst, seconds)
    return accepted, worst


def test_a_mutated_file_is_read_or_refused(tmp_path):
    accepted, worst = read_many(tmp_path, 500, seed=1)
    assert 0 < accepted < 500  # else the mutations are too mild or too wild to try anything
    assert worst < SECONDS


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_read_or_refused_within_two_seconds_and_300_megabytes(tmp_path):
    read_many(tmp_path, 1, seed=2)  # imports torch, which takes most of the memory
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    accepted, worst = read_many(tmp_path, 10_000, seed=2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held
    record("mutated YAML files that ended in a traceback", "0 of 10,000")
    record("mutated YAML files that were still right", f"{accepted:,} of 10,000")
    record("CPU time of the slowest mutated YAML file", f"{worst:.2f} s")
    record("growth of the process over 10,000 mutated YAML files", f"{grown:.0f} MB")
    assert worst < SECONDS
    assert grown < MEGABYTES


words = st.sampled_from(
    ["model", "tasks", "policies", "polices", "seed", "dense", "sparq", "h2o", "needle", "perplexity",
     "dense_layers", "inner", "layers", "k", "r", "compression", "context", "samples", "text", "lm_eval",
     "task",
     "reference", "1/8"]
)  # fmt: skip
scalars = words | st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=5),
)
structures = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | scalars, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "model": st.just("reference") | scalars,
            "tasks": structures,
            "policies": st.lists(structures, max_size=3),
        },
        optional={"seed": structures, "polices": structures, "dtype": structures, "batch_size": structures},
    )
    | structures
)
def test_any_structure_is_read_or_refused(tmp_path, data):
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    assert read(path)[1] < SECONDS
