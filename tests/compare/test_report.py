"""The report, on a run folder made up in the shape of a real one. test_report_browser.py opens it, too."""

import base64
import dataclasses
import gzip
import html
import itertools
import json
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report_run import PROMPT, SAMPLES, TASKS, many_rows, row, sample, synthetic_rows, write_run

from kvsieve.compare import summary
from kvsieve.compare.merge import merge
from kvsieve.compare.report import answers, write_picture, write_report
from kvsieve.compare.report import page as report_page
from kvsieve.compare.report.__main__ import main
from kvsieve.compare.report.depth import depth_maps
from kvsieve.compare.report.folder import read
from kvsieve.compare.report.headline import headline
from kvsieve.compare.report.style import HEAT_DARK, HEAT_LIGHT, PALEST_HALF, styles
from kvsieve.compare.report.svg import Scale
from kvsieve.compare.results import Results, Row, csv_lines, read_csv
from kvsieve.errors import UserError

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), synthetic_rows())


@pytest.fixture(scope="module")
def page(run_folder):
    return write_report(run_folder).read_text(encoding="utf-8")


def headline_of(rows):
    return headline(Results(rows))


def data_of(page):
    """By section."""
    found = re.findall(r'<script type="text/plain" id="data-(\w+)">([\w+/=]*)</script>', page)
    return {name: json.loads(gzip.decompress(base64.b64decode(packed))) for name, packed in found}


def sections_of(page):
    return re.findall(r'<section id="(\w+)">', page)


def scripts_of(page):
    """What a browser runs, or the page brings along."""
    allowed = re.search(r"script-src ([^\"]*)\"", page)[1].split()
    return ["script"] * (len(allowed) + len(data_of(page)))


def test_the_page_holds_every_row_the_headline_and_the_setting_of_the_run(run_folder, page):
    rows = synthetic_rows()
    assert page.count("<tr data-row=") == len(rows)
    assert data_of(page)["results"] == csv_lines(read_csv(run_folder / "summary.csv"))
    assert html.escape(headline(read(run_folder).results)) in page
    assert page.count('<svg class="chart"') == len(TASKS)
    assert page.count('class="mark"') == len(rows)
    frontier = data_of(page)["frontier"]
    assert ["".join(drawn).count('class="mark"') for _, _, drawn in frontier["axes"]] == [len(rows)] * 2
    assert [label.split("\n")[0] for label in frontier["labels"][:2]] == ["dense", "SparQ 1/2"]
    for expected in (
        "reference, 3.21 M parameters, float32", "Intel Xeon 2.80GHz, 2 cores", "torch 2.13.0",
        "2025-11-20 19:40 UTC", "my-policy 1.0", "samples: 32", "<code>budget=64 recent=16</code>",
        "<dt>seed</dt><dd>0</dd>", "characters of 64", "lower is better", "0.890 to 1.000", "2.1 MB",
        "In a clone of kvsieve 0.1.0, with the configuration below", "git checkout 0123456789ab\n"
        "pip install . torch==2.13.0 my-policy==1.0\nkvsieve compare config.yaml --out again",
        "the grey band its 95% interval",
    ):  # fmt: skip
        assert expected in page, expected
    assert f"<dd>{SAMPLES * len(rows)}</dd>" in page  # samples decoded, the torn line left out


def best_of(folder, rows):
    page = write_report(write_run(folder, rows)).read_text(encoding="utf-8")
    return re.findall(r'class="best">([^<]+)<', page[page.index('id="all-results"') :])


def test_best_values_are_marked_among_the_sparse_policies_of_each_group(tmp_path):
    rows = [row("needle", 512, "dense", 1.0),
            row("needle", 512, "sparq", 0.98, "1/8", tokens_per_second=100),
            row("needle", 512, "h2o", 0.96, "1/8", tokens_per_second=300)]  # fmt: skip
    assert best_of(tmp_path, rows) == ["0.980", "262 kB", "300"]


def test_a_policy_that_lost_the_answers_is_best_at_nothing(tmp_path):
    rows = [row("needle", 512, "dense", 1.0),
            row("needle", 512, "sparq", 0.98, "1/8", tokens_per_second=100, kv_bytes=9e6),
            row("needle", 512, "sparq", 0.97, "1/4", tokens_per_second=90, kv_bytes=8e6),
            row("needle", 512, "h2o", 0.2, "1/8", tokens_per_second=300, kv_bytes=1e6)]  # fmt: skip
    assert rows[-1].mark == "worse"
    assert best_of(tmp_path, rows) == ["0.980", "100", "8 MB"]


def test_a_noisy_speed_is_grey_named_and_not_the_best(tmp_path):
    noisy = {"tokens_per_second": 300, "tokens_per_second_min": 110, "tokens_per_second_max": 1147}
    steady = {"tokens_per_second": 100, "tokens_per_second_min": 95, "tokens_per_second_max": 105}
    rows = [row("needle", 512, "dense", 1.0, **steady),
            row("needle", 512, "sparq", 0.98, "1/8", **noisy),
            row("needle", 512, "h2o", 0.98, "1/8", **steady),
            row("needle", 512, "odd", 0.98, "1/8", **steady | {"tokens_per_second": 99})]  # fmt: skip
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert '<span class="noisy">300</span><small>noisy: 110 to 1,147</small>' in page
    assert page.count('class="noisy"') == 1
    assert '<span class="best">100</span>' in page
    assert "differ by more than 20% of their median" in page


def test_a_difference_shows_its_interval_its_mark_and_the_answers(tmp_path):
    rows = [row("needle", 512, "dense", 1.0),
            row("needle", 512, "sparq", 1.0, "1/8", lost=0, won=0),
            row("needle", 512, "h2o", 0.2, "1/8", lost=26, won=0),
            row("needle", 512, "odd", 0.5, "1/8", mark="few")]  # fmt: skip
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    for expected in ("<span>+0.000</span><small>-0.020 to +0.020</small><small>lost 0, won 0 of 32</small>",
                     '<span class="worse">▼ -0.800</span><small>-0.820 to -0.780</small><small>lost 26,',
                     "<small>few samples</small>"):  # fmt: skip
        assert expected in page, expected


def test_what_ran_eagerly_is_said_beside_its_speed(tmp_path):
    rows = [row("needle", 512, "dense", 1.0), row("needle", 512, "h2o", 0.1, "1/8", ran_eagerly="it <looks>")]
    write_run(tmp_path, rows)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<small>eager</small>") == 1
    assert "Not as one CUDA graph a step: h2o 1/8 (it &lt;looks&gt;)." in page


def test_a_failed_cell_stays_in_the_table_without_numbers(tmp_path):
    rows = [row("needle", 512, "dense", 1.0), row("needle", 512, "sparq", 1.0, "1/8")]
    nothing = {field.name: None for field in dataclasses.fields(Row) if "float" in str(field.type)}
    failed = dataclasses.replace(rows[1], **nothing | {"context": 1024})
    write_run(tmp_path, [*rows, failed], errors=[("needle 1024, sparq 1/8", "NaN in <logits>")])
    page = write_report(tmp_path).read_text(encoding="utf-8").partition("<details>")[0]
    assert "<li>needle 1024, sparq 1/8: NaN in &lt;logits&gt;</li>" in page
    assert "1 cell of this run failed" in page
    last = re.findall(r"<td.*?</td>", page[page.rindex('<th scope="row"') :])
    assert [re.sub("<.*?>", "", cell) for cell in last] == [*["\N{EN DASH}"] * 5, "32"]
    assert not any("data-value" in cell for cell in last[:-1])


def test_the_headline_names_the_share_that_is_certain_and_who_is_worse():
    assert headline_of(synthetic_rows()) == (
        "SparQ kept at least 95% of the dense score in all 6 task settings (95% intervals, n = 32) "
        "while reading about 1/8 of the bytes; "
        "for about as many bytes, H2O was worse than dense in 5 of 6 "
        "and local window was worse than dense in 6 of 6."
    )


def without_numbers(rows):
    return [dataclasses.replace(one, score=None, difference=None, difference_low=None) for one in rows]


def test_the_headline_claims_no_more_than_was_measured():
    needle = [one for one in synthetic_rows() if one.task == "needle"]
    dense = [one for one in needle if one.policy == "dense"]
    others = [one for one in needle if one.policy != "dense"]
    eighths = [one for one in others if one.budget == "1/8" and one.context == 512]
    many = [row("needle", context, f"p{i}", i / 10, "1/8") for i in range(4) for context in (512, 1024, 2048)]
    assert "the 6 others were worse than dense in 3 of 3" in headline_of(needle + many)
    assert "in all 3 task settings" in headline_of(needle)
    failed = [*(one for one in others if one not in eighths), *without_numbers(eighths)]
    assert "SparQ kept" in (cheapest := headline_of(dense + failed))
    assert "about 1/4 of the bytes" in cheapest
    assert "no dense baseline" in headline_of(others)
    assert "dense attention alone" in headline_of(dense)
    unpaired = [dataclasses.replace(one, difference=None) for one in others]
    assert "No row of this run is compared with dense; `kvsieve report`" in headline_of(dense + unpaired)


def test_the_headline_says_less_of_fewer_samples():
    def claim(low, pairs):
        rows = [row("needle", 512, "dense", 1.0),
                row("needle", 512, "sparq", 1.0, "1/8", difference_low=low, pairs=pairs)]  # fmt: skip
        return headline_of(rows)

    assert (
        "SparQ kept at least 82% of the dense score on needle at 512 tokens (95% intervals, n = 16)"
        in claim(-0.171, 16)
    )
    assert claim(-1.0, 2) == (
        "No policy can be said to have kept half of the dense score on needle at 512 tokens "
        "(95% intervals, n = 2); closest came SparQ, with at least 0% while reading about 1/8 of the bytes."
    )


def test_the_headline_is_silent_where_dense_itself_is_at_chance():
    def table(**dense):
        rows = [
            dataclasses.replace(row("needle", 512, "dense", 1.0), **dense),
            row("needle", 512, "sparq", 0.0, "1/8"),
        ]
        return rows, [row("perplexity", 1024, "dense", 1.6), row("perplexity", 1024, "sparq", 1.61, "1/8")]

    lost, known = table(score=0.0, score_low=0.0)
    assert headline_of(lost) == (
        "Dense attention itself did no better than chance on needle at 512 tokens (n = 32), so nothing can "
        "be said about what a policy keeps."
    )
    assert (
        "SparQ kept at least 98% of the dense score in the 1 of 2 task settings with a dense score above"
        in (headline_of(lost + known))
    )
    untrained = [dataclasses.replace(one, score=7.99, score_high=8.01) for one in known[:1]]
    assert "no better than chance on perplexity" in headline_of(untrained + known[1:])
    guessing, _ = table(score=0.27, score_low=0.2, chance=0.25)
    assert "no better than chance" in headline_of(guessing)


def test_a_plugins_name_is_not_capitalised():
    asked = (("dense", ""), ("key_norm", "1/8"))
    rows = [row("needle", context, policy, 1.0, how) for context in (512, 1024) for policy, how in asked]
    assert headline_of(rows).startswith("key_norm kept at least 98% of the dense score in both task settings")


def test_a_sure_loss_is_said_of_the_winner_too():
    rows = [row("needle", 512, "dense", 1.0), row("needle", 512, "sparq", 1.0, "1/8"),
            row("perplexity", 1024, "dense", 1.62),
            row("perplexity", 1024, "sparq", 1.65, "1/8", mark="worse")]  # fmt: skip
    assert "about 1/8 of the bytes, and was measurably worse on perplexity 1024." in headline_of(rows)


def test_lower_is_better_is_turned_round():
    rows = [row("perplexity", 1024, "dense", 1.62),
            row("perplexity", 1024, "sparq", 2.5, "1/8"),
            row("perplexity", 1024, "h2o", 1.6, "1/8")]  # fmt: skip
    assert headline_of(rows) == (
        "H2O kept at least 99% of the dense score on perplexity at 1,024 tokens (95% intervals, n = 32) "
        "while reading about 1/8 of the bytes; for about as many bytes, SparQ was worse than dense."
    )


class Document(HTMLParser):
    """The elements of a page, with their attributes, and its text outside scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.elements or self.elements[-1][0] != "script":
            self.text += data


def test_the_page_asks_nothing_of_the_network(page):
    elements = Document(page).elements
    links = [attributes["href"] for _, attributes in elements if "href" in attributes]
    assert [link for link in links if not link.startswith("#")] == ["https://arxiv.org/abs/2312.04985"]
    assert {link[1:] for link in links[:-1]} <= {attributes.get("id") for _, attributes in elements}
    assert not [attributes for _, attributes in elements if "src" in attributes]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    security = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert security.startswith("default-src 'none'")
    assert "unsafe-eval" not in security


OWN = "document.title='owned'"
ATTACK = f"""</script><script>{OWN}</script><img src=x onerror="{OWN}">{{{{ 7*7 }}}}&"'"""


def attacked_run(folder):
    hostile = dict.fromkeys(("model", "task", "parameters", "not_default", "metric"), ATTACK)
    hostile["task_parameters"] = {ATTACK: ATTACK}
    rows = [dataclasses.replace(one, **hostile) for one in synthetic_rows()[0:7:2]]
    rows[2] = dataclasses.replace(rows[2], policy=ATTACK, budget=ATTACK, policy_label=f"{ATTACK} {ATTACK}")
    rows[3] = dataclasses.replace(rows[3], mark=ATTACK, ran_eagerly=ATTACK)
    write_run(folder, rows)
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()[:-1]]
    for record in records:
        record |= {"answer": ATTACK, "references": [ATTACK], "prompt_end": ATTACK, "facts": {ATTACK: ATTACK}}
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(ATTACK)
    (folder / "environment.json").write_text(json.dumps({ATTACK: ATTACK}))
    return write_report(folder)


def test_strings_of_a_user_cannot_become_script(tmp_path):
    page = attacked_run(tmp_path).read_text(encoding="utf-8")
    document = Document(page)
    assert ATTACK in document.text
    assert [tag for tag, _ in document.elements if tag in ("script", "img")] == scripts_of(page)
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
    assert any(ATTACK in label for label in data_of(page)["frontier"]["labels"])
    assert ATTACK in data_of(page)["answers"][0]["samples"][0]["texts"]


def test_parameters_of_a_task_cannot_become_script(tmp_path):
    rows = [row("needle", 512, "dense", 1.0, task_parameters={ATTACK: value}) for value in (ATTACK, 7)]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    document = Document(page)
    # Over the chart, over its rows, in the list of tasks to choose from, and over its depths.
    assert document.text.count(f"needle {ATTACK}={ATTACK}, 512 tokens") == 4
    assert [tag for tag, _ in document.elements if tag in ("script", "img")] == scripts_of(page)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(run_folder, tmp_path, suffix):
    picture = tmp_path / "images" / f"quickstart.{suffix}"
    assert main([str(run_folder), "--picture", str(picture)]) == 0
    image = picture.read_bytes()
    if suffix == "png":
        assert image.startswith(b"\x89PNG")
        assert len(image) > 20_000
    else:
        text = image.decode()
        for words in ("needle, 2,048 tokens", "repetition, 1,024 tokens", "SparQ", "H2O", ">1/8<"):
            assert words in text
        assert "perplexity" not in text


def test_a_picture_without_words_is_told(run_folder, tmp_path, monkeypatch):
    draw = pytest.importorskip("resvg_py").svg_to_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_picture(run_folder, tmp_path / "x.png")
    monkeypatch.setattr("resvg_py.svg_to_bytes", lambda **how: draw(**how, skip_system_fonts=True))
    with pytest.warns(UserWarning, match="x.png has no words: this machine has no font.*DejaVu Sans.*.svg"):
        write_picture(run_folder, tmp_path / "x.png")


def test_bad_input_is_answered_with_a_message(tmp_path, capsys):
    with pytest.raises(UserError, match=r"\.png or \.svg, not '\.gif'"):
        write_picture(write_run(tmp_path, synthetic_rows()), tmp_path / "x.gif")
    (tmp_path / "summary.csv").write_text("model,task\n")
    with pytest.raises(UserError, match="no line"):
        write_report(tmp_path)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "not the folder of a finished run" in capsys.readouterr().err


def test_a_missing_extra_is_named(run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs resvg_py; pip install 'kvsieve\[report\]', or ask for .svg"):
        write_picture(run_folder, tmp_path / "x.png")
    assert write_picture(run_folder, tmp_path / "x.svg").read_text().startswith("<svg")


def pivot_of(page):
    """The lines of the first table, as text."""
    table = page[page.index('id="pivot"') : page.index("</table>")]
    lines = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [
        [" ".join(re.sub("<.*?>", " ", cell).split()) for cell in re.split("</t[hd]>", line)]
        for line in lines
    ]


def test_the_first_table_is_policies_by_tasks(page):
    first, second, *lines = pivot_of(page)
    assert first[:3] == ["Policy", "Bytes read dense = 1", "needle accuracy"]
    assert "perplexity bits per byte, lower is better" in first
    assert second[:5] == ["512", "1,024", "2,048", "512", "1,024"]
    by_name = {line[0]: line[1:] for line in lines}
    assert list(by_name)[:3] == ["dense", "SparQ 1/2", "SparQ 1/4"]
    assert by_name["H2O 1/8"][:3] == [
        "0.13",
        "0.030 \N{BLACK DOWN-POINTING TRIANGLE}",
        "0.000 \N{BLACK DOWN-POINTING TRIANGLE}",
    ]
    assert by_name["SparQ 1/8"][1] == "1.000"


def test_bytes_that_differ_between_tasks_are_a_range(tmp_path):
    rows = [
        row("needle", context, "odd", 1.0, "1/2", bytes_ratio=ratio)
        for context, ratio in ((512, 0.5), (1024, 1))
    ]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert pivot_of(page)[2][:2] == ["odd 1/2", "0.50 to 1.00"]


def test_a_price_that_was_not_measured_cannot_be_chosen(tmp_path):
    rows = [
        row("needle", 512, policy, 1.0, how, tokens_per_second=None)
        for policy, how in (("dense", ""), ("h2o", "1/2"))
    ]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert re.findall(r'name="axis" value="(\w+)"', page) == ["bytes", "memory"]


def test_noisy_speeds_are_hollow_on_the_axis_of_time_alone(tmp_path):
    noisy = {"tokens_per_second": 300, "tokens_per_second_min": 110, "tokens_per_second_max": 1147}
    rows = [row("needle", 512, "dense", 1.0), row("needle", 512, "h2o", 1.0, "1/2", **noisy)]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    drawn = {
        axis: "".join(panels).count('class="mark noisy"')
        for axis, _, panels in data_of(page)["frontier"]["axes"]
    }
    assert drawn == {"memory": 0, "time": 1}
    assert 'class="mark noisy"' not in page


def depth_run(folder, contexts):
    """Of H2O at the longest context the first half of the prompt is forgotten."""
    rows = [
        row("needle", context, policy, 1.0, how)
        for context in contexts
        for policy, how in (("dense", ""), ("h2o", "1/8"))
    ]
    write_run(folder, rows)
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()[:-1]]
    for record in records:
        forgets = record["cell"] == f"c{len(rows) - 1}" and record["facts"]["depth"] < 0.5
        record["score"] = float(not forgets)
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def squares_of(drawing):
    """What every square tells, and its colour."""
    found = re.findall(r'class="square" role="img" aria-label="([^"]*)" fill="var\(--heat-(\d+)\)"', drawing)
    return {tuple(told.split("\n")): int(level) for told, level in found}


def test_the_heat_map_says_where_the_answers_are_lost(tmp_path):
    (found,) = depth_maps(read(depth_run(tmp_path, (512, 1024))))
    assert [found["task"], found["metric"], found["samples"]] == ["needle", "accuracy", "2"]
    assert [(line["name"], line["context"], line["cells"]) for line in found["lines"]] == [
        ("dense", "512", ["1", "1"]), ("dense", "1,024", ["1", "1"]),
        ("H2O 1/8", "512", ["1", "1"]), ("H2O 1/8", "1,024", ["0", "1"]),
    ]  # fmt: skip
    dense, h2o = re.findall("<svg.*?</svg>", found["drawings"], re.S)
    assert 'aria-label="H2O 1/8, by depth and length"' in h2o
    assert set(squares_of(dense).values()) == {10}
    lost = ("H2O 1/8", "depth: 0 to 50%", "length: 1,024 tokens", "accuracy: 0 (0 to 0.66)", "samples: 2")
    assert len(squares_of(h2o)) == 4
    assert {told: level for told, level in squares_of(h2o).items() if level < 10} == {lost: 0}
    assert re.findall(r">([\d,.]+)</text>", h2o) == [
        "512",
        "1,024",
        "0",
        "1",
        "1",
        "1",
    ]  # numbers: pale, dark


def test_of_one_length_a_single_map_has_a_line_for_each_policy(tmp_path):
    (found,) = depth_maps(read(depth_run(tmp_path, (512,))))
    assert found["length"] == "512"
    assert found["drawings"].count("<svg") == 1
    assert list(squares_of(found["drawings"]).values()) == [10, 10, 0, 10]


def test_runs_shown_apart_have_their_own_maps(tmp_path):
    runs = [depth_run(tmp_path / name, (512, 1024)) for name in ("a", "b")]
    merge(runs, tmp_path / "both", apart=True)
    summary.write(tmp_path / "both")
    maps = depth_maps(read(tmp_path / "both"))
    assert [(one["task"], one["samples"], len(one["lines"])) for one in maps] == [
        ("needle in a", "2", 4),
        ("needle in b", "2", 4),
    ]


def test_a_square_without_a_sample_says_nothing(tmp_path):
    depth_run(tmp_path, (512, 1024))
    kept = [
        line
        for line in (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
        if json.loads(line)["cell"] != "c3" or json.loads(line)["sample"] == 0
    ]
    (tmp_path / "samples.jsonl").write_text("".join(kept))
    (found,) = depth_maps(read(tmp_path))
    assert found["samples"] == "1 to 2"
    assert found["lines"][3]["cells"] == ["0", "\N{EN DASH}"]
    assert len(squares_of(found["drawings"])) == 7
    assert found["drawings"].count("stroke-dasharray") == 1


@pytest.mark.parametrize(
    ("levels", "ink", "paper"), [(HEAT_LIGHT, "#1b2026", "#ffffff"), (HEAT_DARK, "#e8ebee", "#13161a")]
)
def test_the_colours_of_heat_maps_are_in_order_and_their_numbers_can_be_read(levels, ink, paper):
    """By lightness alone, which all colour vision has; contrast as WCAG counts it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one, other):
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    assert len(levels) == 11
    steps = [contrast(one, paper) for one in levels]
    assert all(after / before > 1.08 for before, after in itertools.pairwise(steps))
    assert min(contrast(level, ink if i <= PALEST_HALF else paper) for i, level in enumerate(levels)) >= 4.5


def named_as_left_out(page):
    said = re.search(r"Left out of it: (.*?)\.</p>", page)
    return re.findall(r"([a-z ]+) \(see (.*?)\)", said[1]) if said else []


def test_what_does_not_fit_is_left_out_whole_and_the_conclusions_last(run_folder, page, monkeypatch):
    everything = ["overview", "frontier", "results", "depth", "heads", "answers", "again"]
    assert sections_of(page) == everything
    assert named_as_left_out(page) == []
    run, counts = read(run_folder), []
    for share in (0.9, 0.7, 0.5, 0.35, 0.2):
        most = int(share * len(page.encode()))
        monkeypatch.setattr(report_page, "MOST", most)
        smaller = report_page.render(run)
        assert len(smaller.encode()) <= most
        kept = sections_of(smaller)
        assert kept == [name for name in everything if name in kept]
        # A section that is left out takes along its data and its link.
        assert set(data_of(smaller)) <= set(kept)
        assert re.findall(r'<a href="#(\w+)">', smaller) == ["top", *kept]
        assert len(named_as_left_out(smaller)) == len(everything) - len(kept)
        assert "again" in kept
        assert "overview" in kept or "results" not in kept
        counts.append(len(kept))
    assert counts == sorted(counts, reverse=True)
    assert 2 >= counts[-1] < counts[0]


def test_the_answers_go_first_and_the_page_says_where_they_are(run_folder, page, monkeypatch):
    monkeypatch.setattr(report_page, "MOST", len(page.encode()) - 1)
    smaller = report_page.render(read(run_folder))
    assert named_as_left_out(smaller) == [("answers", "samples.jsonl")]
    assert "This page holds 3 MB at most" in smaller


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [15, 25])
def test_a_page_never_grows_beyond_three_megabytes(tmp_path, tasks):
    """2,745 rows, whose table does not fit beside the charts; 4,575, whose table alone is too large."""
    path = write_report(write_run(tmp_path, many_rows(policies=20, tasks=tasks)))
    page = path.read_text(encoding="utf-8")
    assert 1_000_000 < path.stat().st_size < 3_000_000
    assert named_as_left_out(page)
    assert {"overview", "frontier", "again"} <= set(sections_of(page))
    assert ("all results", "summary.csv") in named_as_left_out(page)


def test_the_answers_stand_side_by_side(page):
    group = next(group for group in data_of(page)["answers"] if group["title"] == "needle, 512 tokens")
    assert [policy["label"] for policy in group["policies"]][:2] == ["dense", "SparQ 1/2"]
    assert len(group["samples"]) == group["all"] == SAMPLES
    first = group["samples"][0]
    assert first["prompt"] == PROMPT
    assert first["expected"] == [" 659250"]
    assert first["facts"] == "depth 0.12"
    assert first["texts"] == [" 659250", " 659000"]  # equal answers once
    assert first["rows"][0] == [0, 1.0]
    assert first["rows"][-1] == [1, 0.0]


def test_of_long_answers_those_stay_on_which_policies_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "ROOM", 100_000)
    rows = [row("needle", 512, "dense", 1.0), row("needle", 512, "sparq", 1.0, "1/8")]
    write_run(tmp_path, rows)
    records = [sample(cell, rows[0], index) for cell in ("c0", "c1") for index in range(200)]
    for record in records:
        record["answer"] = "x" * 1000
    records[-1]["answer"] = "x" * 2000
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cells = json.loads((tmp_path / "cells.json").read_text())
    (tmp_path / "cells.json").write_text(json.dumps([cell | {"samples": 200} for cell in cells]))
    (group,) = data_of(write_report(tmp_path).read_text(encoding="utf-8"))["answers"]
    kept = [one["index"] for one in group["samples"]]
    assert group["all"] == 200
    assert 50 < len(kept) < 100
    assert kept == [*range(len(kept) - 1), 199]  # where they differ first, then in their order
    assert [len(text) for text in group["samples"][-1]["texts"]] == [1000, answers.LONGEST + 1]
    assert len(json.dumps(group)) < 100_000


@pytest.mark.parametrize("name", ["quickstart", "small_k"])
def test_folders_of_older_versions_still_have_a_report(name, tmp_path):
    """The first has no facts, the second no samples and no cells.json."""
    for file in (RESULTS / name).iterdir():
        shutil.copy(file, tmp_path)
    if name == "quickstart":
        records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        old = [
            {k: v for k, v in r.items() if k not in ("facts", "prompt_end", "needs", "crc32")}
            for r in records
        ]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
        cells = json.loads((tmp_path / "cells.json").read_text())
        for cell in cells:
            cell.pop("not_default", None)
        (tmp_path / "cells.json").write_text(json.dumps(cells))
        (tmp_path / "protocol.json").unlink()
        summary.write(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<tr data-row=") == len(read_csv(tmp_path / "summary.csv"))
    assert 'id="depth"' not in page
    assert ('id="answers"' in page) == (name == "quickstart")
    assert "kvsieve compare config.yaml" in page


def test_joined_runs_say_how_they_were_joined(tmp_path):
    write_run(tmp_path, [row("needle", 512, "dense", 1.0)])
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "environment.json").write_text(
        json.dumps({"torch": "2.13.0", "runs": {"here": {}, "a b": {}}})
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<pre id="command">kvsieve report here &#39;a b&#39; --out joined</pre>' in page
    assert "pip install" not in page


def test_forty_policies_look_different():
    look = styles([f"p{i}" for i in range(40)])
    assert len({(style.light, style.shape) for style in look.values()}) == 40


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0.9, 5, 0, 1, log=True), [1, 2, 4]),
        (Scale(2**-10, 2, 0, 1, log=True), [2.0**power for power in range(-10, 2, 2)]),
        (Scale(-0.06, 1.06, 0, 1), [0, 0.25, 0.5, 0.75, 1]),
        (Scale(1.05, 1.68, 0, 1), [1.1, 1.2, 1.3, 1.4, 1.5, 1.6]),
        (Scale(-3, 67, 0, 1), [0, 10, 20, 30, 40, 50, 60]),
    ],
)
def test_ticks_are_round(scale, ticks):
    assert scale.ticks == pytest.approx(ticks)
