"""The report in a real browser: no script error, nothing wider than the window, on a phone, on a desk and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import VARIABLE, Page, find_browser, open_browser
from report_facts import make_facts, searched, tiered

from dense2moe.convert.report.writer import write_report

_WIDER = """
[...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > WIDTH + 0.5 || box.left < -0.5) && !element.closest(".scroll, pre");
}).map((element) => element.outerHTML.slice(0, 120))
"""
_SIZES = """
[...document.querySelectorAll("main *, footer")]
  .filter((element) => [...element.childNodes].some((n) => n.nodeType == 3 && n.data.trim()))
  .map((element) => {
    const matrix = element.ownerSVGElement ? element.getScreenCTM() : {a: 1, b: 0};
    return parseFloat(getComputedStyle(element).fontSize) * Math.hypot(matrix.a, matrix.b);
  })
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    write_report(searched(tiered(make_facts())), output)
    return output / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = find_browser()
    if executable is None:
        pytest.skip(f"no Chromium on the path; install one, or name it by {VARIABLE}")
    with open_browser(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_report_fits_and_complains_of_nothing(page: Page, report: Path, width: int, height: int) -> None:
    page.complaints.clear()
    page.open(report, width, height)
    assert page.evaluate("document.querySelectorAll('figure svg').length") == 12
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(_WIDER.replace("WIDTH", str(width))) == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((box) => box.clientWidth < innerWidth)")
    assert page.complaints == []


def test_all_text_can_be_read_on_a_phone(page: Page, report: Path) -> None:
    page.open(report, 390, 844)
    sizes = page.evaluate(_SIZES)
    assert len(sizes) > 300
    assert min(sizes) >= 7  # CSS pixels; the smallest are numbers in a heat map of many columns


def test_the_verdict_is_on_the_first_screen(page: Page, report: Path) -> None:
    page.open(report, 390, 844)
    assert page.evaluate("document.querySelector('.badge').getBoundingClientRect().bottom < innerHeight / 2")


@pytest.mark.parametrize(("table", "num_marks"), [("Models", 3), ("Tiers", 3 * 7)])
def test_whether_each_model_passed_is_seen_on_a_phone(page: Page, report: Path, table: str, num_marks: int) -> None:
    page.open(report, 390, 844)
    places = page.evaluate(
        f"[...document.querySelectorAll('[aria-label=\"{table}\"] .mark')]"
        ".map((mark) => mark.getBoundingClientRect().right)"
    )
    assert len(places) == num_marks
    assert max(places) < 390


def test_a_page_that_runs_a_script_or_loads_a_picture_is_caught(page: Page, report: Path, tmp_path: Path) -> None:
    """The test can fail: the page's own policy refuses both, and the console says so."""
    text = report.read_text(encoding="utf-8")
    wide = '<p style="width: 2000px">wide</p><script>alert(1)</script><img src="data:image/png;base64,AAAA">'
    (tmp_path / "bad.html").write_text(text.replace("</main>", f"{wide}</main>"), encoding="utf-8")
    page.complaints.clear()
    page.open(tmp_path / "bad.html", 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    assert len(page.evaluate(_WIDER.replace("WIDTH", "390"))) >= 1
    assert any("Content Security Policy" in str(complaint) for complaint in page.complaints)


def test_on_paper_tables_are_not_cut(page: Page, report: Path, tmp_path: Path) -> None:
    """A4 within its margins is 688 CSS pixels wide; there a table that scrolls would lose what is out of sight."""
    page.open(report, 688, 900)
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.evaluate("document.documentElement.scrollWidth") == 688
        wide = (
            "[...document.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth + "
            "1).map((box) => box.ariaLabel)"
        )
        assert page.evaluate(wide) == []
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
    page.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
