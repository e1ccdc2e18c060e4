"""The page as text: its data, its policy, that it is whole."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lorafind.map import page
from lorafind.map.collect import Map
from tests.map.made import HOSTILE, made, many, point

pytest.importorskip("plotly")


class _Reader(HTMLParser):
    """Scripts as a browser separates them, and what could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy = ""
        self.loads: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        self.loads += [f"{tag} {name}" for name in ("src", "href", "action") if name in facts]
        if facts.get("http-equiv") == "Content-Security-Policy":
            self.policy = facts["content"] or ""
        self._open = tag == "script"
        if self._open:
            self.scripts.append((facts, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            facts, text = self.scripts[-1]
            self.scripts[-1] = (facts, text + data)


def read(text: str) -> _Reader:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader


def hostile() -> Map:
    points = [
        point(k + 1, text, label=text, genre=text, folder=text) for k, text in enumerate(HOSTILE)
    ]
    return made(points, np.random.default_rng(1).standard_normal((len(points), 3)))


def test_hostile_names_stay_in_the_data() -> None:
    reader = read(page.page(hostile()))
    assert [facts.get("type") for facts, _ in reader.scripts] == ["application/json", None, None]
    told = json.loads(reader.scripts[0][1])
    assert told["name"] == list(HOSTILE)
    assert sorted(told["colourings"][0]["names"]) == sorted(HOSTILE)
    assert not re.search("[<>&\u2028\u2029]", reader.scripts[0][1])
    assert reader.loads == []


def test_the_policy_names_the_two_scripts_and_no_place() -> None:
    reader = read(page.page(many(50)))
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for _, text in reader.scripts[1:]
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in reader.policy.split(";"))
    assert rules["script-src"].split() == [*hashes, "'unsafe-eval'"]
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert "http" not in reader.policy and "*" not in reader.policy
    assert "\r" not in reader.scripts[1][1]


def test_embedded_is_json_again() -> None:
    value = {"a": [*HOSTILE, 'x"\\\n'], "b": None, "c": 1.5}
    assert json.loads(page.embedded(value)) == value


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.html"
    page.write(many(20), path)
    first = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    broken = many(20)
    broken.scores[0, 0] = np.inf
    with pytest.raises(ValueError):
        page.write(broken, path)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["map.html"]
