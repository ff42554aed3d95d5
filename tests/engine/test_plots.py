"""Pictures: well-formed, described, the same each time, true to their numbers; no stranger's text gets out of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.plots import Dot, Mark, Series, bars, escape, heat_map, intervals, lines, number, plain, scatter

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert(1)</script>\"' onload='x' & \u202eevil\u202c \x00\x1b ]]> 漢字"
INFINITE = [Mark("a", 0.1, -math.inf, math.inf), Mark("b", None), Mark("c", math.nan), Mark("d", 2.0, 1.0, math.inf)]

PICTURES: dict[str, Callable[[str], str]] = {
    "intervals": lambda text: intervals([Mark(text, 0.2, 0.1, 0.3, "good"), *INFINITE], text, text, text),
    "lines": lambda text: lines(
        [Series(text, tuple((float(x), mark) for x, mark in enumerate(INFINITE))),
         Series("b", ((1.0, Mark("x", 1.0)),))],
        text,
        text,
        text,
        text,
        True,
    ),
    "scatter": lambda text: scatter([Dot(text, 0.1, 2.0), Dot("b", 0.1, 1.0)], [text], text, text, text, text),
    "heat_map": lambda text: heat_map([text, "b"], [text, "2"], [[0.1, None], [math.inf, 3.0]], text, text),
    "bars": lambda text: bars([Mark(text, -0.5, -1.0, math.inf), *INFINITE], text, text, text),
}  # fmt: skip
EMPTY: dict[str, Callable[[], str]] = {
    "intervals": lambda: intervals([], "t", "d"),
    "lines": lambda: lines([], "t", "d", "x", "y"),
    "scatter": lambda: scatter([], [], "t", "d", "x", "y"),
    "heat_map": lambda: heat_map([], [], [], "t", "d"),
    "bars": lambda: bars([], "t", "d"),
}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", PICTURES)
def test_a_strangers_text_stays_text(name):
    svg = PICTURES[name](HOSTILE)
    root = ElementTree.fromstring(svg)
    kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert kinds <= {"svg", "title", "desc", "style", "g", "text", "line", "circle", "rect", "polyline", "polygon"}
    assert not any(key.lower().startswith("on") for element in root.iter() for key in element.attrib)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\0\x1b]", svg)
    assert root.find(f"{SVG}title").text == plain(HOSTILE)
    assert root.attrib["role"] == "img"
    assert "漢字" in root.find(f"{SVG}desc").text


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_each_time_and_all_of_its_numbers_are(name):
    svg = PICTURES[name]("label")
    assert svg == PICTURES[name]("label")
    for element in ElementTree.fromstring(svg).iter():
        for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points"):
            for value in re.split("[ ,]", element.attrib.get(key, "0")):
                assert math.isfinite(float(value or 0))


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_show_is_a_picture_too(name):
    assert ElementTree.fromstring(EMPTY[name]()).find(f"{SVG}title").text == "t"


def test_an_interval_lies_where_its_numbers_are():
    svg = intervals([Mark("a", 1.0, 0.0, 2.0, "good"), Mark("b", 0.0, -1.0, 1.0, "even")], "t", "d", "axis")
    root = ElementTree.fromstring(svg)
    (zero,) = [line for line in root.iter(f"{SVG}line") if line.attrib["class"] == "axis"]
    first, second = [circle.attrib for circle in root.iter(f"{SVG}circle")]
    thick = [line.attrib for line in root.iter(f"{SVG}line") if line.attrib.get("stroke-width") == "3"]
    assert float(second["cx"]) == pytest.approx(float(zero.attrib["x1"]), abs=0.2)
    assert float(thick[0]["x1"]) == pytest.approx(float(zero.attrib["x1"]), abs=0.2)
    assert float(first["cx"]) == pytest.approx((float(thick[0]["x1"]) + float(thick[0]["x2"])) / 2, abs=0.2)
    assert (first["class"], second["class"]) == ("good", "even hollow")
    assert [text.text for text in root.iter(f"{SVG}title")][1] == "a: 1 (0 to 2)"


def test_an_interval_without_end_reaches_the_edge_and_has_no_cap_there():
    svg = intervals([Mark("a", 1.0, 0.0, math.inf), Mark("b", 5.0, 4.0, 6.0)], "t", "d")
    lines_ = [line.attrib for line in ElementTree.fromstring(svg).iter(f"{SVG}line")]
    thick = [line for line in lines_ if line.get("stroke-width") == "3"]
    caps = [line for line in lines_ if line.get("stroke-width") == "2"]
    assert float(thick[0]["x2"]) > float(thick[1]["x2"])
    assert len(caps) == 3


def test_a_line_goes_up_where_numbers_do_and_has_its_band():
    points = tuple((x, Mark(str(x), x * x, x * x - 0.1, x * x + 0.1)) for x in (0.5, 1.0, 1.5))
    root = ElementTree.fromstring(lines([Series("neon", points)], "t", "d", "weight", "quality"))
    ys = [float(circle.attrib["cy"]) for circle in root.iter(f"{SVG}circle")]
    xs = [float(circle.attrib["cx"]) for circle in root.iter(f"{SVG}circle")]
    assert ys == sorted(ys, reverse=True)  # SVG counts downwards
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert len(list(root.iter(f"{SVG}polygon"))) == 1
    assert {"0.5", "1", "1.5", "weight", "quality"} <= set(
        texts(lines([Series("neon", points)], "t", "d", "weight", "quality"))
    )


def test_steps_far_apart_are_spread_evenly():
    points = tuple((x, Mark(str(x), 1.0)) for x in (10.0, 100.0, 1000.0))
    root = ElementTree.fromstring(lines([Series("run", points)], "t", "d", "step", "loss"))
    xs = [float(circle.attrib["cx"]) for circle in root.iter(f"{SVG}circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_the_front_is_filled_and_joined():
    dots = [Dot("a", 0.0, 1.0), Dot("b", 1.0, 0.0), Dot("c", 1.0, 1.0)]
    root = ElementTree.fromstring(scatter(dots, ["a", "b"], "t", "d", "x", "y"))
    assert [circle.attrib["class"] for circle in root.iter(f"{SVG}circle")] == ["good", "good", "even hollow"]
    (line,) = root.iter(f"{SVG}polyline")
    assert len(line.attrib["points"].split()) == 2


def test_a_cell_is_darker_where_its_value_is_larger_and_crossed_out_where_there_is_none():
    svg = heat_map(["a"], ["1", "2", "3"], [[1.0, 2.0, None]], "t", "d")
    root = ElementTree.fromstring(svg)
    shades = [float(rect.attrib["fill-opacity"]) for rect in root.iter(f"{SVG}rect")]
    assert len(shades) == 2
    assert shades[0] < shades[1]
    assert "a, 3: –" in [title.text for title in root.iter(f"{SVG}title")]
    assert {"1", "2"} <= set(texts(svg))


def test_a_bar_begins_at_zero():
    root = ElementTree.fromstring(bars([Mark("a", 1.0), Mark("b", -1.0)], "t", "d"))
    (zero,) = [float(line.attrib["x1"]) for line in root.iter(f"{SVG}line") if line.attrib["class"] == "axis"]
    up, down = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in root.iter(f"{SVG}rect")]
    assert up[0] == pytest.approx(zero, abs=0.2)
    assert sum(down) == pytest.approx(zero, abs=0.2)
    assert up[1] == pytest.approx(down[1], abs=0.2)


def test_a_label_that_is_too_long_is_cut_in_the_middle_and_whole_in_its_title():
    label = "a very long label of an arm " * 6 + "end"
    root = ElementTree.fromstring(intervals([Mark(label, 1.0)], "t", "d"))
    shown = next(text.text for text in root.iter(f"{SVG}text") if "…" in text.text)
    assert len(shown) < 45
    assert shown.endswith("end")
    assert plain(label) in [title.text for title in root.iter(f"{SVG}title")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "−∞"),
     (-0.12345, "−0.123"), (1234567.0, "1230000"), (0.0, "0"),
     (1e-9, "1e−09")],
)  # fmt: skip
def test_numbers_as_they_are_read(value, text):
    assert number(value) == text


@given(st.text())
def test_escaped_text_is_xml_and_reads_back(text):
    element = ElementTree.fromstring(f"<a b='{escape(text)}'>{escape(text)}</a>")
    assert (element.text or "") == plain(text)
    assert element.attrib["b"] == plain(text)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=6))
def test_whatever_the_numbers_are_there_is_a_picture(rows):
    marks = [Mark(str(n), *row) for n, row in enumerate(rows)]
    for svg in (intervals(marks, "t", "d"), bars(marks, "t", "d")):
        ElementTree.fromstring(svg)
        places = re.findall(r' (?:c?[xy][12]?|width|height)="([^"]*)"', svg)
        assert all(math.isfinite(float(place)) for place in places)
