"""The page of a comparison: one file, whole while runs finish, and what it says of them."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from east_plugins.__main__ import main
from east_plugins.ops import svg
from east_plugins.training import runs
from east_plugins.training.compare import compare as training_compare

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Text, tags that are open at the end, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in VOID)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.words.append(data)

    def __contains__(self, words):
        return words in " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison whose page was kept as every run finished."""
    out, pages = tmp_path_factory.mktemp("report"), []

    def keep(job, summary, number, count):
        pages.append((out / "report.html").read_text())

    settings = dict(model="cnn", width=4, data="digits", limit=120, batch_size=60, epochs=3, threads=1, device="cpu")
    training_compare(["set", "rigl"], [0.8, 0.997], out, seeds=(0, 1), finished=keep, **settings)
    return out, pages


def test_the_page_is_there_from_the_first_run_on_and_needs_nothing_else(compared):
    out, pages = compared
    assert [f"{i} of 8 runs finished" in Page(text) for i, text in enumerate(pages, 1)] == [True] * 8
    for text in (*pages, (out / "report.html").read_text()):
        page = Page(text)
        assert page.open == [] and page.fetched == [] and "<script" not in text and "url(" not in text


def test_the_page_has_the_table_curves_verdicts_and_settings(compared):
    out, _ = compared
    text = (out / "report.html").read_text()
    page = Page(text)
    for line in (out / "table.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert all(f"<td>{cell}</td>" in text for cell in cells) or "---" in line or cells[0] == "method"
    assert "80 % of the weights zero" in page and "99.7 % of the weights zero" in page
    assert text.count("<polyline") == 2 * 3 * 2  # sparsities, pictures, methods
    assert "Settings that differ" in page and "growth" in page and "gradient" in page and "random" in page
    dead = [
        path.parent.name
        for path in out.glob("*/summary.json")
        if not runs.read_summary(path.parent)["effective_density"]
    ]
    assert dead and text.count("dead: no active weight lies on a path") == len(dead) + 1  # the note below the table


def test_pictures_are_whole_and_hold_every_epoch(compared):
    out, _ = compared
    pictures = re.findall(r"<svg viewBox.*?</svg>", (out / "report.html").read_text())
    assert len(pictures) == 2 * 3
    for picture in pictures:
        for line in ElementTree.fromstring(picture).iter("polyline"):
            assert len(line.get("points").split()) == 3


def test_names_and_errors_of_others_are_text(tmp_path, capsys, monkeypatch):
    (tmp_path / "of_html.py").write_text("def rule(layer):\n    raise RuntimeError('<script>alert(1)</script>')\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--model cnn --width 4 --data digits --limit 100 --sparsities 0.7 --epochs 4 --threads 1".split()
    words = ["--methods", "rigl", "--growth", "of_html:rule", "--update-frequency", "1"]
    assert main(["compare", *words, *flags, "--out", str(tmp_path / "c")]) == 2
    text = (tmp_path / "c" / "report.html").read_text()
    assert "0 of 1 runs finished, 1 failed" in text and "&lt;script&gt;" in text and "<script" not in text


def test_curves_leave_out_what_is_not_finite_and_keep_the_ends_of_long_lines():
    points = [(float(x), 0.5, 0.4, 0.6) for x in range(1, 1001)]
    picture = svg.curves(
        [svg.Curve("long", points), svg.Curve("<gone>", [(1.0, math.nan, 0.0, 0.0)])], "a < b", "epoch", 1.0
    )
    line = ElementTree.fromstring(picture).find("polyline").get("points").split()
    assert len(line) == svg.MOST_POINTS and "&lt;" in picture
    xs = [float(point.split(",")[0]) for point in line]
    right = svg.WIDTH - svg.RIGHT
    assert xs[0] == pytest.approx(svg.LEFT + (right - svg.LEFT) / 1000, abs=0.1) and xs[-1] == right
    middle = svg.TOP + (svg.HEIGHT - svg.TOP - svg.BOTTOM) / 2
    assert {float(point.split(",")[1]) for point in line} == {middle}


@pytest.mark.parametrize("highest", [1e-7, 0.013, 1, 3, 12, 100, 250])
def test_ticks_are_round_and_four_to_eight(highest):
    found = svg.ticks(highest)
    assert found[0] == 0 and found[-1] <= highest and 3 <= len(found) <= 8


def test_twenty_eight_lines_differ():
    assert len({svg.style(i) for i in range(28)}) == 28
