"""Charts: well-formed SVG, scales that hold the values, gaps that show, words for screen readers."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from exporter.report.chart import Chart, Series, bar, line_chart

CHART = Chart("Noise <b>", "What it shows.", "dB", ["0", "1", "2", "logits"])


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, 30.0, 4.0], [1e-6, None, 0.0, 1.0], [None] * 4, [-3.5, 0.0, 1.0, 2.0], [5e-9] * 4],
)
def test_any_values_give_a_chart(values: list[float | None], log: bool) -> None:
    chart = Chart("t", "d", "u", CHART.labels, log)
    figure = parse(
        line_chart(chart, [Series("one", "a", values), Series("limit", "limit", [0.5] * 4)], "k")
    )
    svg = figure[0]
    assert svg.get("role") == "img" and svg.get("aria-labelledby") == "k-t k-d"
    for mark in svg.iter("circle"):
        if "cx" in mark.attrib:
            assert (
                0 <= float(mark.get("cx", "-1")) <= 720 and 0 <= float(mark.get("cy", "-1")) <= 300
            )
    titles = [title.text for title in svg.iter("title")][1:]
    assert len(titles) == 4
    assert titles[3] == (
        "one, logits: not finite or no value"
        if values[3] is None
        else f"one, logits: {values[3]:.3g}"
    )
    assert len(svg.findall("g[@class='bad']")) == values.count(None)


def test_words_are_escaped_and_kept() -> None:
    markup = line_chart(CHART, [Series("a & b", "b", [1, 2, 3, 4])], "k")
    figure = parse(markup)
    assert [element.text for element in figure[0][:2]] == ["Noise <b>", "What it shows."]
    assert "".join(figure[1].itertext()) == "a & b"


def test_higher_values_are_drawn_higher() -> None:
    svg = parse(line_chart(CHART, [Series("s", "a", [1.0, 2.0, 3.0, 4.0])], "k"))[0]
    heights = [float(mark.get("cy", "nan")) for mark in svg.iter("circle")][:4]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 4


def test_zeros_lie_below_all_that_is_more() -> None:
    """Exact layers are not drawn on their limit."""
    chart = Chart("t", "d", "u", CHART.labels, log=True)
    lines = [Series("s", "a", [0.0, 0.0, 0.0, 0.0]), Series("limit", "limit", [1.0] * 4)]
    svg = parse(line_chart(chart, lines, "k"))[0]
    ticks = {
        "".join(tick.itertext()): float(tick.get("y", "nan"))
        for tick in svg.iter("text")
        if tick.get("text-anchor") == "end"
    }
    assert list(ticks) == ["0", "1"] and ticks["1"] < ticks["0"]
    (height,) = {float(mark.get("cy", "nan")) for mark in svg.iter("circle") if "cx" in mark.attrib}
    assert ticks["0"] - height == 4  # a label stands so much below its line


def test_many_labels_are_thinned_and_the_last_stays() -> None:
    labels = [*map(str, range(80)), "logits"]
    svg = parse(line_chart(Chart("t", "d", "u", labels), [Series("s", "a", [1.0] * 81)], "k"))[0]
    shown = [
        text.text
        for text in svg.iter("text")
        if text.get("text-anchor") == "middle" and text.get("class") == "tick"
    ]
    assert shown[0] == "0" and shown[-1] == "logits" and len(shown) <= 13


def test_bar_is_clamped_and_named() -> None:
    assert (
        bar(0.25, "a quarter")
        == '<span class="bar" role="img" aria-label="a quarter"><i style="width:25.0%"></i></span>'
    )
    assert "width:100.0%" in bar(7, "x")


def test_a_line_that_lies_on_another_is_told_from_it() -> None:
    def legend(values: list[float | None]) -> tuple[str, int]:
        figure = parse(
            line_chart(CHART, [Series("one", "a", [1, 2, 30, 4]), Series("two", "b", values)], "k")
        )
        broad = [path for path in figure[0].iter("path") if "under" in path.get("class", "")]
        return "".join(figure[1].itertext()), len(broad)

    assert legend([1.0, 2.1, 30.0, 20.0]) == ("onetwo (lies on: one)", 1)
    for apart in ([1.0, 9.0, 30.0, 20.0], [None, None, 30.0, 4.0]):
        assert legend(apart) == ("onetwo", 0)
