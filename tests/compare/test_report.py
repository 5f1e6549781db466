"""The report, on a run folder made up here in the shape of a real one."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from kvsieve.errors import UserError

pytest.importorskip("altair", reason="the extra 'report' is not installed")
pytest.importorskip("vl_convert", reason="the extra 'report' is not installed")

from kvsieve.compare.report import write_picture, write_report
from kvsieve.compare.report.__main__ import main
from kvsieve.compare.report.folder import read
from kvsieve.compare.report.headline import headline
from kvsieve.compare.results import Results, Row, write_csv

POLICIES = {"sparq": "r=8 k={k}", "h2o": "budget={k} recent={q}", "local_window": "budget={k} sinks=16"}
SHARES = (1 / 2, 1 / 4, 1 / 8)
# metric, higher is better, dense score, and how much of it each policy keeps at SHARES of the bytes
TASKS = {
    ("needle", 512): ("accuracy", True, 1.0, (1, 1, 1), (0.53, 0.22, 0.03), (0.5, 0.25, 0.09)),
    ("needle", 1024): ("accuracy", True, 1.0, (1, 1, 0.97), (0.5, 0.19, 0.0), (0.44, 0.28, 0.12)),
    ("needle", 2048): ("accuracy", True, 0.97, (1, 1, 0.97), (0.47, 0.13, 0.0), (0.5, 0.22, 0.06)),
    ("repetition", 512): (
        "characters of 64",
        True,
        51.3,
        (1, 1.02, 0.99),
        (0.62, 0.3, 0.1),
        (0.5, 0.2, 0.09),
    ),
    ("repetition", 1024): (
        "characters of 64",
        True,
        46.0,
        (1, 0.99, 0.97),
        (0.6, 0.2, 0.08),
        (0.5, 0.2, 0.08),
    ),
    ("perplexity", 1024): (
        "bits per byte",
        False,
        1.62,
        (1, 1.001, 1.012),
        (1, 1.02, 1.05),
        (1.01, 1.03, 1.06),
    ),
}


def row(task, context, policy, score, compression="", **values):
    metric, higher_is_better, dense = TASKS[task, context][:3]
    spread = 0.0 if score in (0, 1) else {"accuracy": 0.08, "bits per byte": 0.03}.get(metric, 4.0)
    share = 1 / int(compression[2:]) if compression else 1.0
    dense_bytes = context * 4096
    far = abs(score - dense) > 0.06 * dense
    difference = {
        "difference": score - dense,
        "difference_low": score - dense - 0.02 * dense,
        "difference_high": score - dense + 0.02 * dense,
        "pairs": 32,
        "mark": ("better" if (score > dense) == higher_is_better else "worse")
        if far
        else "indistinguishable",
    }
    found = {
        "model": "reference",
        "task": task,
        "task_parameters": {},
        "context": context,
        "policy": policy,
        "policy_label": f"{policy} {compression}".strip(),
        "parameters": "",
        "budget": compression,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "chance": 0.0 if higher_is_better else 8.0,
        "score": score,
        "score_low": max(score - spread, 0),
        "score_high": min(score + spread, 1) if metric == "accuracy" else score + spread,
        "samples": 32,
        **(difference if policy != "dense" else {}),
        "bytes_per_step": share * dense_bytes,
        "bytes_ratio": share * 1.01 if compression else 1.0,
        "kv_bytes": dense_bytes * (1.5 if policy == "sparq" else share),
        "tokens_per_second": 250 - 40 * share,
    }
    return Row(**found | values)


def synthetic_rows():
    rows = []
    for (task, context), (metric, _, dense, *kept) in TASKS.items():
        rows.append(row(task, context, "dense", dense))
        for (policy, parameters), qualities in zip(POLICIES.items(), kept, strict=True):
            for share, quality in zip(SHARES, qualities, strict=True):
                described = parameters.format(k=int(context * share), q=int(context * share / 4))
                score = min(dense * quality, 1.0) if metric == "accuracy" else dense * quality
                rows.append(row(task, context, policy, score, f"1/{1 / share:.0f}", parameters=described))
    return rows


def write_run(folder, rows):
    write_csv(folder / "summary.csv", rows)
    (folder / "config.yaml").write_text("model: reference\ntasks:\n  - needle: {context: 512, samples: 32}\n")
    environment = {
        "started": "2025-11-20T19:40:11+00:00",
        "kvsieve": "0.1.0",
        "plugins": {"my-policy": "1.0"},
        "python": "3.11.2",
        "torch": "2.13.0",
        "cpu": "Intel Xeon 2.80GHz",
        "cores": 2,
        "gpu": None,
        "dtype": "float32",
        "parameters": 3211520,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for one in rows:
            for sample in range(2):
                line = {name: getattr(one, name) for name in ("task", "context", "policy", "score")}
                file.write(json.dumps({"cell": "c0ffee", "sample": sample, "seconds": 0.3} | line) + "\n")
        file.write('{"cell": "c0ffee", "sam')  # killed in the middle of a line
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), synthetic_rows())


@pytest.fixture(scope="module")
def page(run_folder):
    return write_report(run_folder).read_text(encoding="utf-8")


def headline_of(rows):
    return headline(Results(rows))


def charts_of(page):
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_every_row_the_headline_and_the_setting_of_the_run(run_folder, page):
    assert page.count('<th scope="row"') == len(synthetic_rows())
    assert html.escape(headline(read(run_folder).results)) in page
    assert page.count('<div class="chart"') == len(TASKS) == len(charts_of(page))
    for expected in ("reference, 3.21 M parameters, float32", "Intel Xeon 2.80GHz, 2 cores", "torch 2.13.0",
                     "2025-11-20 19:40 UTC", "my-policy 1.0", "samples: 32", "budget=64 recent=16",
                     "characters of 64", "lower is better", "0.890 to 1.000", "2.1 MB",
                     "the grey band its 95% interval"):  # fmt: skip
        assert expected in page, expected
    assert f"{2 * len(synthetic_rows())}" in page  # samples decoded, the torn line left out


def best_of(folder, rows):
    page = write_report(write_run(folder, rows)).read_text(encoding="utf-8")
    return re.findall(r'class="best">([^<]+)<', page[page.index("<tbody>") :])


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
    write_run(tmp_path, [*rows, failed])
    errors = {"needle 512, dense": None, "needle 1024, sparq 1/8": "NaN in <logits>"}
    cells = [{"label": label, "error": error} for label, error in errors.items()]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    page = write_report(tmp_path).read_text(encoding="utf-8").partition("</table>")[0]
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
    assert [attributes["href"] for _, attributes in elements if "href" in attributes] == [
        "https://arxiv.org/abs/2312.04985"
    ]
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
    hostile = dict.fromkeys(("model", "task", "parameters", "metric"), ATTACK)
    hostile["task_parameters"] = {ATTACK: ATTACK}
    rows = [dataclasses.replace(one, **hostile) for one in synthetic_rows()[0:7:2]]
    rows[2] = dataclasses.replace(rows[2], policy=ATTACK, budget=ATTACK, policy_label=f"{ATTACK} {ATTACK}")
    rows[3] = dataclasses.replace(rows[3], mark=ATTACK, ran_eagerly=ATTACK)
    write_run(folder, rows)
    (folder / "config.yaml").write_text(ATTACK)
    (folder / "environment.json").write_text(json.dumps({ATTACK: ATTACK}))
    return write_report(folder)


def test_strings_of_a_user_cannot_become_script(tmp_path):
    page = attacked_run(tmp_path).read_text(encoding="utf-8")
    document = Document(page)
    assert ATTACK in document.text
    assert [tag for tag, _ in document.elements if tag in ("script", "img")] == ["script"] * 3
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
    assert ATTACK in [
        point["parameters"] for points in charts_of(page)[0]["datasets"].values() for point in points
    ]


def test_parameters_of_a_task_cannot_become_script(tmp_path):
    rows = [row("needle", 512, "dense", 1.0, task_parameters={ATTACK: value}) for value in (ATTACK, 7)]
    document = Document(write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8"))
    assert (
        document.text.count(f"needle {ATTACK}={ATTACK}, 512 tokens") == 2
    )  # over the chart and over the table
    assert [tag for tag, _ in document.elements if tag in ("script", "img")] == ["script"] * 3


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


def test_bad_input_is_answered_with_a_message(tmp_path, capsys):
    with pytest.raises(UserError, match=r"\.png or \.svg, not '\.gif'"):
        write_picture(write_run(tmp_path, synthetic_rows()), tmp_path / "x.gif")
    (tmp_path / "summary.csv").write_text("model,task\n")
    with pytest.raises(UserError, match="no line"):
        write_report(tmp_path)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "not the folder of a finished run" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    for module in ("chart", "page", "table"):
        monkeypatch.delitem(sys.modules, f"kvsieve.compare.report.{module}")
    monkeypatch.delattr("kvsieve.compare.report.chart")
    with pytest.raises(UserError, match=r"needs altair; pip install 'kvsieve\[report\]'"):
        write_report(write_run(tmp_path, synthetic_rows()))


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--virtual-time-budget=4000", "--enable-logging=stderr", "--window-size=1200,2200",
         "--dump-dom"]  # fmt: skip

# What a reader does: sort by score, then point at the first mark of the first chart.
READER = """<script>addEventListener("load", () => setTimeout(() => {
  for (const _ of [1, 2]) document.querySelectorAll("thead button")[1].click();
  const mark = document.querySelector(".chart path[aria-roledescription=point]");
  const {x, y, width, height} = mark.getBoundingClientRect();
  const where = {bubbles: true, clientX: x + width / 2, clientY: y + height / 2};
  for (const type of ["pointermove", "mousemove"]) mark.dispatchEvent(new MouseEvent(type, where));
}, 1000))</script>"""


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a browser and returns the document as its scripts left it; an error fails."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine: what a browser draws is not checked")

    def browse(page):
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", path.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert "CONSOLE" not in shown.stderr, shown.stderr
        return shown.stdout

    return browse


def test_a_browser_draws_the_charts(page, browse):
    shown = browse(page)
    assert 'data-charts="drawn"' in shown
    charts = re.findall(r"<svg[^>]*class=\"marks\".*?</svg>", shown, re.S)
    assert len(charts) == len(TASKS)
    for chart in charts:
        assert chart.count('aria-roledescription="point"') == 10  # dense, and three policies at three ratios
        assert "NaN" not in chart


def test_a_reader_sorts_and_points(tmp_path, browse):
    page = attacked_run(tmp_path).read_text(encoding="utf-8")
    without_its_guard = re.sub(r"<meta http-equiv.*?>", "", page) + READER
    shown = browse(without_its_guard)
    lines = re.findall(r'<th scope="row".*?</tr>', shown, re.S)
    scores = [float(re.search(r'<td data-value="([\d.]+)"', line)[1]) for line in lines]
    assert len(scores) == 4
    assert scores == sorted(scores)  # the first click has put the best on top, the second the worst
    tooltip = Document(shown[shown.index('id="vg-tooltip-element"') - 20 :]).text
    assert "95% interval" in tooltip
    assert ATTACK in tooltip
    assert "<title>owned" not in shown
