"""Progress: a live table in a terminal, plain lines elsewhere."""

import io
import re

from rich.console import Console

from kvsieve.compare import run

TEXT = """\
    batch_size: 2
    tasks: [needle: {context: 80, samples: 2}]
    policies: [dense, h2o: {tokens: 20}]
    """


def printed(load, model, folder, **options):
    out = io.StringIO()
    run.compare(load(TEXT), folder, Console(file=out, width=90, **options), model)
    return out.getvalue()


def test_a_terminal_shows_the_table_so_far_under_the_bar(load, model, tmp_path):
    shown = printed(load, model, tmp_path / "a", force_terminal=True)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", shown)
    assert "2/4 samples" in frames
    # The first table comes with the first batch: one policy, no other yet.
    table = frames[frames.index("policy") :]
    assert re.search(r"dense\s+1\.00", table)


def test_elsewhere_there_are_plain_lines(load, model, tmp_path):
    lines = printed(load, model, tmp_path / "b").splitlines()
    assert [line.partition(" samples")[0] for line in lines[:2]] == ["2/4", "4/4"]
    assert not any("policy" in line or "\x1b" in line for line in lines)
