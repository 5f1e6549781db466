"""The page's section of layers and heads, from the diagnostics of a run."""

import html
import re

import numpy as np
import pytest
from tests.report_run import synthetic_rows, write_run

from kvsieve.compare.diagnostics import Diagnosed
from kvsieve.compare.report import write_report
from kvsieve.compare.report.heads import head_maps
from kvsieve.compare.results import Results

ROWS = synthetic_rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), ROWS)


def section(page):
    return page.partition('<section id="heads">')[2].partition("</section>")[0]


def test_every_policy_has_its_means_its_worst_heads_and_maps(folder):
    shown = section(write_report(folder).read_text("utf-8"))
    lines = re.findall(r"<tr>\s*<th scope=\"row\">.*?</tr>", shown, re.DOTALL)
    assert len(lines) == len({row.policy_label for row in ROWS})
    text = [" ".join(re.sub(r"<[^>]+>", " ", line).split()) for line in lines]
    assert text[0] == "dense 1.000 1.000 0.000 0.000"
    assert html.unescape(text[1]) == (
        "SparQ 1/2 0.875 least 0.70 in layer 3, head 2 0.625 least 0.10 in layer 3, head 2 "
        "0.125 most 0.30 in layer 3, head 2 0.000"
    )
    assert "up to 5 steps of\n  up to 12 samples" in shown
    assert [line.count('role="img"') for line in lines] == [0] + [3] * (len(lines) - 1)
    assert 'aria-label="Mass kept by layer and head: least 0.70 in layer 3, head 2"' in lines[1]


def test_a_map_is_as_strong_as_its_numbers():
    numbers = np.zeros((4, 2, 3))
    numbers[0] = [[0, 1, 1], [0.5, 0.26, 7]]
    (line,) = head_maps([Diagnosed("sparq", "sparq 1/8", 1, 1, [0, 1], numbers)], Results(ROWS))["lines"]
    drawing = line["cells"][0]["map"]
    paths = dict(re.findall(r'<path d="([^"]+)" stroke-opacity="([^"]+)"', drawing))
    assert paths == {"M1 0.5h2M2 1.5h1": "1", "M0 1.5h1": "0.5", "M1 1.5h1": "0.25"}
    assert [cell["map"] for cell in line["cells"][1:]] == [""] * 3  # nothing differs


def test_a_policy_whose_samples_are_gone_is_left_out():
    gone = Diagnosed("tova", "tova 1/8", 1, 1, [0], np.ones((4, 1, 1)))
    assert head_maps([gone], Results(ROWS)) is None


def test_a_page_of_many_heads_keeps_its_size():
    numbers = np.random.default_rng(0).random((4, 80, 64))
    many = [Diagnosed("sparq", f"sparq {i}", 1, 1, [*range(80)], numbers) for i in range(8)]
    found = head_maps(many, Results(ROWS))
    drawn = [line["cells"][0]["map"] != "" for line in found["lines"]]
    assert drawn == [True] * 2 + [False] * 6
    assert found["some"]
    assert sum(len(cell["map"]) for line in found["lines"] for cell in line["cells"]) < 1_000_000


def test_a_run_without_diagnostics_has_no_such_section(folder, tmp_path):
    other = write_run(tmp_path, ROWS)
    (other / "diagnostics.jsonl").unlink()
    page = write_report(other).read_text("utf-8")
    assert section(page) == ""
    assert "#heads" not in page
