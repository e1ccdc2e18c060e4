"""The page in a real browser: hover, click, keys, search, 3D, 10,000 points, hostile names."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafind.map import page
from lorafind.map.facts import Pictures, Point, thumbnail
from tests.map.browser import Page, chromium
from tests.map.made import HOSTILE, made, many, point

pytest.importorskip("plotly")

#: Five in a row and one above the middle: where the arrow keys must lead is plain.
PLACES = np.array([[-2, 0, 0], [-1, 0, 1], [0, 0, 0], [1, 0, 1], [2.5, 0, 0], [0, 2, 0]], float)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def _six() -> list[Point]:
    facts = {"rank": "16", "base_model": "SDXL"}
    return [
        point(k + 10, f"style {'abcdef'[k]}", folder="left" if k < 2 else "right", **facts)
        for k in range(6)
    ]


@pytest.fixture
def six(browser: Any, tmp_path: Path) -> Iterator[Page]:
    PIL = pytest.importorskip("PIL.Image")
    PIL.new("RGB", (400, 300), "red").save(tmp_path / "p.png")
    jpeg = base64.b64encode(thumbnail(tmp_path / "p.png", 96)).decode()
    page.write(made(_six(), PLACES, Pictures({11: jpeg})), tmp_path / "map.html")
    opened = Page(browser, tmp_path / "map.html")
    yield opened
    assert opened.problems() == []
    # Nothing was fetched but the page itself.
    assert opened.requests() == {(tmp_path / "map.html").as_uri()}


def test_hover_shows_what_is_known(six: Page) -> None:
    six.point_at(1)
    six.wait("return !document.getElementById('tip').hidden")
    assert six.text("#tip strong") == "style b"
    told = six.text("#tip dl")
    assert all(word in told for word in ("/loras/style b.safetensors", "Rank16", "SDXL"))
    size = six.wait(
        "const i = document.querySelector('#tip img'); return i.naturalWidth && "
        "[i.naturalWidth, i.naturalHeight]"
    )
    assert size == [96, 72]
    six.point_at(4)
    six.wait("return document.getElementById('tip').dataset.point === '4'")
    assert not six.run("return document.querySelector('#tip img')")


def test_click_shows_neighbours_and_copies_the_path(six: Page) -> None:
    six.browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    six.point_at(2, click=True)
    six.wait("return !document.getElementById('detail').hidden")
    assert six.text("#detail strong") == "style c"
    names = six.run(
        "return [...document.querySelectorAll('#nearest button')].map(b => "
        "b.firstChild.textContent)"
    )
    # By the distance in three dimensions: √2, √2, 2, 2, 2.5.
    assert {*names[:2]} == {"style b", "style d"} and names[4] == "style e"
    six.wait("return document.getElementById('status').textContent.startsWith('Path copied')")
    copied = six.browser.execute_async_script(
        "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done('' + e))"
    )
    assert copied == "/loras/style c.safetensors"
    six.find("#nearest button[data-point='3']").click()
    six.wait("return document.getElementById('detail').dataset.point === '3'")


def test_keys(six: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    six.run("document.getElementById('plot').focus()")
    six.keys(Keys.ARROW_RIGHT)
    six.wait("return document.getElementById('tip').dataset.point === '0'")
    for key, there in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_RIGHT, 2),
        (Keys.ARROW_UP, 5),
        (Keys.ARROW_DOWN, 2),
        (Keys.ARROW_RIGHT, 3),
        (Keys.ARROW_LEFT, 2),
    ):
        six.keys(key)
        six.wait("return document.getElementById('tip').dataset.point === arguments[0]", str(there))
        assert f"style {'abcdef'[there]}" in six.text("#status")
    six.keys(Keys.ENTER)
    six.wait("return document.getElementById('detail').dataset.point === '2'")
    six.keys(Keys.ESCAPE)
    six.wait("return document.getElementById('detail').hidden")


def test_every_control_can_be_reached_by_tab(six: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    six.run("document.getElementById('search').focus()")
    met = []
    for _ in range(24):
        met.append(
            six.run(
                "const e = document.activeElement, s = getComputedStyle(e); return [e.id || "
                "(e.closest('[id]') || {id: 'body'}).id, s.outlineStyle !== 'none', "
                "e.labels && e.labels.length ? "
                "e.labels[0].textContent.trim() : e.getAttribute('aria-label') || "
                "e.dataset.title || e.textContent.trim()]"
            )
        )
        six.keys(Keys.TAB)
    names = {name for name, _, _ in met}
    assert {"search", "colour", "view", "hulls", "stars", "plot", "legend"} <= names
    ours = [one for one in met if one[0] in ("search", "colour", "view", "hulls", "plot", "legend")]
    assert all(visible and label for _, visible, label in ours), ours


def test_search(six: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    six.keys("/")
    six.find("#search").send_keys("STYLE e.safe")
    rows = six.run("return [...document.querySelectorAll('#results li')].map(r => r.dataset.point)")
    assert rows == ["4"] and six.text("#status") == "1 found"
    six.keys(Keys.ENTER)
    six.wait("return document.getElementById('detail').dataset.point === '4'")
    six.find("#search").clear()
    six.find("#search").send_keys("style")
    six.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    marked = six.run("return document.querySelector('[aria-selected=true]').dataset.point")
    assert marked == "1"
    assert six.find("#search").get_attribute("aria-activedescendant") == "result-1"
    six.keys(Keys.ENTER)
    six.wait("return document.getElementById('detail').dataset.point === '1'")
    six.keys(Keys.ESCAPE)
    assert six.find("#search").get_attribute("value") == ""


def test_3d_hulls_stars_and_hidden_kinds(six: Page) -> None:
    kinds = "return document.getElementById('plot').data.map(t => t.type + ' ' + t.mode)"
    assert six.run(kinds) == ["scattergl markers"] * 2
    six.find("#stars").click()
    six.wait("return document.getElementById('plot').data.length === 6")
    six.run(
        "for (const [id, value] of [['hulls', 'colour'], ['view', '3']]) { const e = "
        "document.getElementById(id); e.value = value; e.dispatchEvent(new Event('change')); }"
    )
    six.wait("return document.getElementById('plot').data.some(t => t.type === 'scatter3d')")
    assert six.run(kinds).count("scatter3d markers") == 4
    six.find("#legend button").click()
    six.wait("return document.getElementById('plot').data.length === 4")
    assert six.find("#legend button").get_attribute("aria-pressed") == "false"


def test_hover_and_click_in_3d(six: Page) -> None:
    six.run(
        "const e = document.getElementById('view'); e.value = '3'; "
        "e.dispatchEvent(new Event('change'));"
    )
    six.wait(
        "return !!document.getElementById('plot')._fullLayout.scene?._scene?.glplot?.cameraParams"
    )
    # The camera's own matrices say where a point stands.
    where = (
        "const plot = document.getElementById('plot'), scene = plot._fullLayout.scene._scene;"
        "const { model, view, projection } = scene.glplot.cameraParams, i = arguments[0];"
        "const d = JSON.parse(document.getElementById('data').textContent).deep;"
        "let v = [0, 1, 2].map(k => d[k][i] * scene.dataScale[k]).concat(1);"
        "for (const m of [model, view, projection]) v = [0, 1, 2, 3].map(r => "
        "v.reduce((sum, value, c) => sum + m[4 * c + r] * value, 0));"
        "const r = scene.container.getBoundingClientRect();"
        "return [r.left + (1 + v[0] / v[3]) / 2 * r.width, "
        "r.top + (1 - v[1] / v[3]) / 2 * r.height]"
    )
    for number in (5, 4):
        x, y = six.run(where, number)
        six.pointer(round(x), round(y))
        six.wait(
            "return document.getElementById('tip').dataset.point === `${arguments[0]}`", number
        )
    six.pointer(round(x), round(y), click=True)
    six.wait("return document.getElementById('detail').dataset.point === '4'")


@pytest.mark.parametrize("dark", [False, True])
def test_hostile_names_stay_text(browser: Any, tmp_path: Path, dark: bool) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    points = [
        point(k + 1, text, label=text, genre=text, folder=text, base_model=text, rank=text)
        for k, text in enumerate(HOSTILE * 3)
    ]
    vectors = np.random.default_rng(0).standard_normal((len(points), 3))
    page.write(made(points, vectors), tmp_path / "map.html")
    opened = Page(browser, tmp_path / "map.html")
    legend = opened.run(
        "return [...document.querySelectorAll('#legend button span:first-of-type')]"
        ".map(e => e.textContent)"
    )
    assert sorted(legend) == sorted(HOSTILE)
    before = opened.run("return document.querySelectorAll('script, a, img').length")
    opened.run(
        "const e = document.getElementById('hulls'); e.value = 'genre'; "
        "e.dispatchEvent(new Event('change'));"
    )
    opened.wait("return document.querySelectorAll('.annotation').length === arguments[0]", 11)
    for k, text in enumerate(HOSTILE):
        opened.point_at(k, click=True)
        opened.run(
            "document.getElementById('search').value = arguments[0];"
            "document.getElementById('search').dispatchEvent(new Event('input'))",
            text[:9],
        )
        opened.wait("return document.querySelectorAll('#results li').length > 0")
        opened.run(
            "document.querySelector(`#results li[data-point='${arguments[0]}']`)"
            ".dispatchEvent(new MouseEvent('mousedown'))",
            k,
        )
        opened.wait(
            "return document.getElementById('detail').dataset.point === `${arguments[0]}`", k
        )
        assert opened.text("#detail strong") == text
    assert opened.run("return document.querySelectorAll('script, a, img').length") == before
    assert opened.run("return window.hacked") is None
    assert opened.requests() == {(tmp_path / "map.html").as_uri()}
    assert opened.problems() == []


def test_the_policy_forbids_scripts_and_connections(browser: Any, tmp_path: Path) -> None:
    page.write(made(_six(), PLACES), tmp_path / "map.html")
    opened = Page(browser, tmp_path / "map.html")
    opened.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s); const d = document.createElement('div');"
        'd.innerHTML = \'<img src="http://127.0.0.1:9/x.png" onerror="window.hacked = 2">\';'
        "document.body.append(d);"
    )
    refused = browser.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done(false), "
        "e => done(e instanceof TypeError))"
    )
    assert refused and opened.run("return window.hacked") is None
    told = " ".join(opened.problems())
    for rule in ("script-src", "img-src", "connect-src"):
        assert rule in told
    buttons = opened.run(
        "return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)"
    )
    assert set(buttons) == {
        "Download plot as a PNG",
        "Zoom",
        "Pan",
        "Zoom in",
        "Zoom out",
        "Autoscale",
        "Reset axes",
    }


def test_ten_thousand_points(browser: Any, tmp_path: Path) -> None:
    n = 10_000
    page.write(many(n), tmp_path / "map.html")
    opened = Page(browser, tmp_path / "map.html")
    drawn = opened.run(
        "return document.getElementById('plot').data.reduce((s, t) => s + t.x.length, 0)"
    )
    assert drawn == n
    opened.run(
        "document.getElementById('search').value = 'lora 01234';"
        "document.getElementById('search').dispatchEvent(new Event('input'))"
    )
    opened.find("#search").send_keys("\n")
    opened.wait("return document.getElementById('detail').dataset.point === '1234'")
    # The point of the extreme left stands alone enough to be pointed at.
    first = opened.run(
        "const x = JSON.parse(document.getElementById('data').textContent).flat[0];"
        "return x.indexOf(x.reduce((a, b) => Math.min(a, b)))"
    )
    opened.point_at(first, click=True)
    opened.wait(
        "return document.getElementById('detail').dataset.point === `${arguments[0]}`", first
    )
    spent = browser.execute_async_script(
        "const done = arguments[0], t = performance.now();"
        "const e = document.getElementById('stars'); e.click();"
        "const look = () => document.getElementById('plot').data.length > 100 ? "
        "done(performance.now() - t) : setTimeout(look, 20); look();"
    )
    assert spent < 20_000
    assert opened.problems() == []
