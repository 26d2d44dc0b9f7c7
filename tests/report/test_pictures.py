import re
import sys
import xml.etree.ElementTree

import numpy as np
import numpy.testing
import pytest

from jaxdistill.errors import UserError
from jaxdistill.report import pictures
from jaxdistill.report.curves import Chart, Line, Panel

matplotlib = pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


def line(values, style="noisy", colour="blue", **options):
    values = np.asarray(values, float)
    return Line("a", np.arange(len(values)), values, colour, style, **options)


def panel(*charts):
    return Panel("title", charts, end=100)


def paths(svg):
    root = xml.etree.ElementTree.fromstring(svg)
    return [e for e in root.iter() if e.tag.endswith("path")]


def test_an_svg_follows_the_colours_of_the_page():
    svg = pictures.draw(panel(Chart((line(range(100)), line(range(100), "dots", "red")))), "p")
    assert "var(--blue)" in svg and "var(--red)" in svg and "var(--muted)" in svg
    assert not re.search(r"(?:fill|stroke): ?#(?!0{3,6})", svg), "a fixed colour was left"
    assert svg.startswith("<svg") and svg.endswith("</svg>")


def test_the_background_is_transparent():
    svg = pictures.draw(panel(Chart((line(range(5)),))), "p")
    assert "#ffffff" not in svg and "fill: white" not in svg


def test_text_is_text_in_the_font_of_the_page():
    svg = pictures.draw(panel(Chart((line(range(5)),), "nats per token")), "p")
    assert ">nats per token</text>" in svg and ">step</text>" in svg
    assert "DejaVu" not in svg


def test_the_same_input_gives_the_same_bytes_and_names_do_not_clash():
    def draw(name):
        return pictures.draw(panel(Chart((line(range(50)),), marks=(3,))), name)

    assert draw("a") == draw("a")
    ids = [set(re.findall(r'id="([^"]+)"', draw(name))) for name in ("a", "b")]
    assert ids[0] and ids[0].isdisjoint(ids[1])


def test_values_are_said_where_the_pointer_rests():
    lower = Line("<b>", np.array([0, 50, 100]), np.array([0.5, np.nan, 0.25]), "red", percent=True)
    svg = pictures.draw(panel(Chart((line(range(101)), lower)), Chart((line(range(5)),))), "p")
    root = xml.etree.ElementTree.fromstring(svg)
    strips = [e for e in root.iter() if e.tag.endswith("rect") and len(e)]
    said = [strip[0].text for strip in strips]
    assert said[0] == "step 0: a 0; <b> 50.0%" and "step 100: a 100.0; <b> 25.0%" in said
    assert said[-1] == "step 4: a 4.000" and len(said) == 48 + 5
    height = float(root.get("viewBox").split()[3])
    tops = {float(strip.get("y")) for strip in strips}
    assert len(tops) == 2 and all(0 < top < height for top in tops)
    # Strips of one chart lie beside each other, over its whole width.
    upper = [strip for strip in strips if float(strip.get("y")) == min(tops)]
    ends = [float(strip.get("x")) + float(strip.get("width")) for strip in upper]
    starts = [float(strip.get("x")) for strip in upper[1:]]
    assert np.allclose(ends[:-1], starts, atol=0.15)


def test_the_settings_of_others_are_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # of another test
    before = matplotlib.rcParams.copy()
    pictures.draw(panel(Chart((line(range(5)),))), "p")
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_a_few_wild_values_are_told_instead_of_flattening_the_rest():
    calm = np.sin(np.arange(200)) + 5
    wild = calm.copy()
    wild[[20, 30]] = 1000.0
    assert "above" not in pictures.draw(panel(Chart((line(calm),))), "p")
    assert "2 above, up to 1000" in pictures.draw(panel(Chart((line(wild),))), "p")


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [np.nan, 1.0, np.nan], [1e-9, 2e-9], [1e12, 3e12]]
)
def test_odd_series_are_drawn(values):
    assert paths(pictures.draw(panel(Chart((line(values),))), "p"))


@pytest.mark.parametrize("count", [1, 3, 100])
def test_shares_are_stacked(count):
    chart = Chart((line([0.6] * count), line([0.4] * count, colour="orange")), stacked=True)
    svg = pictures.draw(panel(chart), "p")
    assert "fill: var(--blue)" in svg and "fill: var(--orange)" in svg


def test_long_series_are_thinned_to_means_of_groups():
    steps, values = np.arange(5000), np.arange(5000, dtype=float)
    values[7] = np.nan
    thin_steps, thin_values = pictures.thin(steps, values)
    assert len(thin_steps) == 500 and thin_steps[-1] == 4999
    assert thin_values[0] == np.mean([0, 1, 2, 3, 4, 5, 6, 8, 9])
    assert thin_values[1] == np.arange(10, 20).mean()
    kept_steps, kept_values = pictures.thin(steps[:400], values[:400])
    numpy.testing.assert_array_equal(kept_values, values[:400])
    assert len(kept_steps) == 400


def test_smoothing_ignores_a_spike_and_keeps_gaps_and_levels():
    values = np.full(300, 2.0)
    values[100], values[200] = 1e6, np.nan
    smoothed = pictures.smooth(values)
    assert np.isnan(smoothed[200])
    numpy.testing.assert_allclose(np.delete(smoothed, 200), 2.0)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (3e-4, "3e-4"),
        (2.5e-5, "2.5e-5"),
        (0.25, "0.25"),
        (2000.0, "2000"),
        (40000.0, "40k"),
        (2.5e6, "2.5M"),
        (-0.5, "-0.5"),
    ],
)
def test_ticks_are_short(value, text):
    assert pictures._tick(value) == text


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'jaxdistill\[report\]'") as caught:
        pictures.require()
    assert caught.value.exit_code == 2
