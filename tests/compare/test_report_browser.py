"""The report in a browser: what a reader sees, clicks, types and saves."""

import csv
import io
import re
import shutil

import pytest
from tests.report_run import synthetic_rows, write_run

from kvsieve.compare.report import page as report_page
from kvsieve.compare.report import write_report
from kvsieve.compare.report.folder import read

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no chromium on this machine: what a browser shows is not checked", allow_module_level=True)
sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("run"), synthetic_rows()))


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, report):
    """One page for all tests; each opens it anew. An error in its console fails the test that follows."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    context.close()


def show(page, report):
    page.goto(report.as_uri())
    page.locator("html[data-charts=drawn]").wait_for()


@pytest.fixture
def opened(page, report):
    page.set_viewport_size({"width": 1200, "height": 900})
    page.emulate_media(color_scheme="light", media="screen")
    show(page, report)
    yield page
    assert page.said == []


def visible_rows(page):
    return page.locator("#all-results tr[data-row]:visible")


def marks(page):
    return page.locator(".chart:visible").first.locator(".mark:visible")


def test_the_filters_filter(opened):
    whole = len(synthetic_rows())
    assert opened.inner_text("#count") == f"{whole} rows"
    opened.fill("#find", "h2o 1/8")
    assert visible_rows(opened).count() == 6
    assert opened.inner_text("#count") == f"6 of {whole} rows"
    opened.select_option("#task", "1")
    assert visible_rows(opened).count() == 1
    assert opened.locator("#all-results .group:visible").all_inner_texts() == [
        "needle, 1,024 tokens accuracy"
    ]
    opened.fill("#find", "")
    opened.select_option("#mark", "worse")
    assert all("\N{BLACK DOWN-POINTING TRIANGLE}" in text for text in visible_rows(opened).all_inner_texts())
    assert visible_rows(opened).count() == 6  # of H2O and local window


def test_the_columns_sort_within_each_task(opened):
    def scores(task):
        cells = opened.locator("#all-results tbody").nth(task).locator("tr[data-row] td:nth-child(2)")
        return [float(cell.get_attribute("data-value")) for cell in cells.all()]

    opened.get_by_role("button", name="Score", exact=True).click()
    for task in range(2):
        assert scores(task) == sorted(scores(task), reverse=True)
    opened.get_by_role("button", name="Score", exact=True).press("Enter")
    assert scores(0) == sorted(scores(0))
    assert opened.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_policies_can_be_hidden_from_the_charts(opened):
    def frontier():
        return opened.locator(".chart:visible .frontier").first.get_attribute("d")

    assert marks(opened).count() == 10
    with_all = frontier()
    opened.locator(".legend").get_by_role("button", name="SparQ").click()
    assert marks(opened).count() == 7
    assert frontier() != with_all  # SparQ stood on it
    opened.get_by_role("button", name="Hide all").click()
    assert marks(opened).count() == 0
    opened.get_by_role("button", name="Show all").click()
    assert frontier() == with_all


def test_the_price_can_be_chosen(opened):
    texts = []
    for axis in ("Bytes read", "Memory held", "Time a token"):
        opened.get_by_text(axis, exact=True).first.click()
        assert opened.locator(".chart:visible").count() == 6
        texts.append(opened.locator(".chart:visible").first.text_content())
    assert ["dense = 1" in text for text in texts] == [True] * 3
    assert len(set(texts)) == 3


def test_the_keyboard_reaches_every_mark(opened):
    """One stop in the tab order for each chart; from there the arrows lead to all of its marks."""
    stops = opened.locator(".chart:visible .mark[tabindex='0']")
    assert stops.count() == opened.locator(".chart:visible").count()
    stops.first.focus()
    seen = []
    for _ in range(marks(opened).count()):
        seen.append(opened.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert opened.inner_text("#tip").split("\n") == seen[-1].split("\n")
        opened.keyboard.press("ArrowRight")
    assert set(seen) == {mark.get_attribute("aria-label") for mark in marks(opened).all()}
    assert any(
        text.startswith("H2O 1/8\naccuracy: 0.030 (0.000 to 0.110)\nagainst dense: -0.97") for text in seen
    )
    opened.keyboard.press("Escape")
    assert opened.locator("#tip").is_hidden()


def focused(page):
    return page.evaluate("document.activeElement.getAttribute('aria-label')").split("\n")


def test_the_keyboard_reaches_every_square(opened):
    """Two tasks with several lengths: a map for each policy, one stop in the tab order each."""
    opened.locator("#depth .square").first.wait_for()
    maps = opened.locator("#depth .maps .map")
    assert maps.count() == 2 * 10
    assert opened.locator("#depth .square[tabindex='0']").count() == maps.count()
    squares = maps.last.locator(".square")
    squares.first.focus()
    seen = [focused(opened)]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        opened.keyboard.press(key)
        seen.append(focused(opened))
    assert [[line.split(": ")[1] for line in one[1:3]] for one in seen] == [
        ["0 to 50%", "512 tokens"],
        ["0 to 50%", "1,024 tokens"],
        ["50 to 100%", "1,024 tokens"],
        ["50 to 100%", "512 tokens"],
        ["50 to 100%", "512 tokens"],  # nothing is further to the left
    ]
    assert opened.inner_text("#tip").split("\n") == seen[-1]
    opened.keyboard.press("Escape")
    assert opened.locator("#tip").is_hidden()
    squares.first.hover()
    assert opened.inner_text("#tip").split("\n") == seen[0]


def test_a_pointed_mark_tells_its_numbers(opened):
    mark = marks(opened).last
    mark.scroll_into_view_if_needed()
    mark.hover()
    assert opened.inner_text("#tip").startswith("dense\naccuracy: 1.000")
    opened.mouse.move(10, 10)
    assert opened.locator("#tip").is_hidden()


def test_answers_are_compared_with_those_of_dense(opened):
    def shown():
        return {
            row.locator("th").inner_text(): row.locator("td").first
            for row in opened.locator("#answers-shown tbody tr").all()
        }

    assert "the secret number of Bergen is" in opened.inner_text("#answers-shown pre")
    assert shown()["H2O 1/8"].locator("mark").inner_text() == "000"  # of 659250 and 659000 that is new
    assert shown()["SparQ 1/8"].locator("mark").count() == 0
    opened.get_by_role("button", name="The next sample").click()
    assert shown()["Expected"].inner_text().strip() == "659251"
    opened.select_option("#answers-task", label="needle, 1,024 tokens")
    assert opened.locator("#answers-sample option").first.inner_text().startswith("0: depth 0.12, 6 of 9")


def clipboard(page):
    return page.evaluate("navigator.clipboard.readText()")


def copy(page, section, button):
    page.locator(section).get_by_role("button", name=button, exact=True).click()
    page.get_by_text("Copied.").wait_for(state="attached")
    page.evaluate("report.say('')")
    return clipboard(page)


def test_what_is_shown_can_be_copied(opened, report):
    lines = copy(opened, "#overview", "Copy as Markdown").splitlines()
    assert lines[0].startswith("| policy | bytes read | needle 512 | needle 1,024 |")
    assert lines[2].startswith("| dense | 1.00 | 1.000 |")
    assert len({line.count("|") for line in lines}) == 1
    found = list(csv.reader(io.StringIO(copy(opened, "#overview", "Copy as CSV"))))
    assert found[1][:3] == ["dense", "1.00", "1.0"]
    opened.fill("#find", "h2o 1/8")
    found = copy(opened, "#results", "Copy as CSV")
    whole = (report.parent / "summary.csv").read_text().splitlines()
    assert found.splitlines() == [whole[0], *(line for line in whole if ",h2o 1/8," in line)]
    lines = copy(opened, "#results", "Copy as Markdown").splitlines()
    assert lines[2].startswith("| needle, 512 tokens | H2O 1/8 | 0.030 (")
    assert len(lines) == 2 + 6
    assert "kvsieve compare config.yaml" in copy(opened, "#again .code:first-of-type", "Copy")


@pytest.mark.parametrize("kind", ["SVG", "PNG"])
def test_a_chart_can_be_saved(opened, tmp_path, kind):
    opened.locator(".legend").get_by_role("button", name="H2O").click()
    with opened.expect_download() as saved:
        opened.locator(".save").first.get_by_role("button", name=f"as {kind}").click()
    assert saved.value.suggested_filename == f"needle-512-tokens.{kind.lower()}"
    saved.value.save_as(tmp_path / "chart")
    image = (tmp_path / "chart").read_bytes()
    if kind == "PNG":
        assert image.startswith(b"\x89PNG")
        assert int.from_bytes(image[16:20], "big") == 3 * 400  # pixels across
    else:
        text = image.decode()
        assert "var(" not in text
        assert "SparQ" in text
        assert "H2O" not in text


@pytest.mark.parametrize("kind", ["SVG", "PNG"])
def test_heat_maps_can_be_saved(opened, tmp_path, kind):
    opened.locator("#depth .square").first.wait_for()
    with opened.expect_download() as saved:
        opened.locator("#depth .save").first.get_by_role("button", name=f"as {kind}").click()
    assert saved.value.suggested_filename == f"needle-by-depth.{kind.lower()}"
    saved.value.save_as(tmp_path / "maps")
    image = (tmp_path / "maps").read_bytes()
    if kind == "PNG":
        assert image.startswith(b"\x89PNG")
    else:
        text = image.decode()
        assert "var(" not in text
        assert text.count('class="square"') == 10 * 3 * 2  # policies, lengths, depths
        for words in ("H2O 1/8", "SparQ 1/2", "2,048", "accuracy, 2 samples a square"):
            assert words in text


def test_a_page_that_left_something_out_still_works(page, tmp_path, monkeypatch):
    """At each size, nothing is said in the console, and what is there answers."""
    run = read(write_run(tmp_path, synthetic_rows()))
    path, whole = tmp_path / "report.html", len(report_page.render(run).encode())
    for share in (0.9, 0.7, 0.5, 0.35):
        monkeypatch.setattr(report_page, "MOST", int(share * whole))
        path.write_text(report_page.render(run), encoding="utf-8")
        page.goto(path.as_uri())
        assert page.get_by_text("Left out of it").is_visible()
        for section, button in (("#overview", "Copy as CSV"), ("#results", "Copy as Markdown")):
            if page.locator(section).count():
                assert copy(page, section, button).count("\n") >= 10
        if page.locator("#frontier").count():
            assert marks(page).count() == 10
        if page.locator("#depth").count():
            page.locator("#depth .square").first.wait_for()
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_audit_finds_nothing(opened, tmp_path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    opened.emulate_media(color_scheme=scheme)
    rows = [one for one in synthetic_rows() if (one.task, one.context) == ("needle", 512)]
    show(opened, write_report(write_run(tmp_path, rows, errors=[("needle 512, odd", "NaN")])))
    for details in opened.locator("details").all():
        details.evaluate("one => { one.open = true; }")
    found = axe.Axe().run(opened).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def test_a_phone_scrolls_down_and_never_sideways(opened):
    opened.set_viewport_size({"width": 360, "height": 740})
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    # A table that is wider scrolls by itself, and nothing of it is hidden.
    for region in opened.get_by_role("region").all():
        assert region.evaluate("one => one.scrollWidth >= one.querySelector('table').offsetWidth")
    assert opened.locator("#all-results thead th:visible").count() == 7
    assert opened.locator("#pivot tbody tr").first.locator("td:visible").count() == 7


def colours(page):
    return page.evaluate("['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])")


def test_dark_is_dark_and_print_is_light_with_the_command(opened):
    opened.emulate_media(color_scheme="dark")
    assert colours(opened) == ["rgb(19, 22, 26)", "rgb(232, 235, 238)"]
    opened.emulate_media(color_scheme="dark", media="print")
    assert colours(opened) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert opened.locator("#command").is_visible()
    assert not opened.locator(".filters").is_visible()
    assert not opened.locator("#again details dl").first.is_visible()
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("#again details dl").first.is_visible()  # the protocol
    assert re.match(rb"%PDF-", opened.pdf())
