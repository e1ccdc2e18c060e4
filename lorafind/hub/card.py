"""What is published with a basis: its facts as ``config.json``, and the card of its repository."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

#: Facts with one entry per component or layout: they are in the basis file itself.
LISTS = ("explained_variance", "scales", "layouts")
#: An id of a licence (huggingface.co/docs/hub/repositories-licenses) or of a repository.
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_ABOUT = {
    "feature": "Feature",
    "groups": "Groups",
    "architecture": "Architecture",
    "base_model": "Base model",
    "components": "Components",
    "loras": "LoRAs",
    "artists": "Artists",
    "calibration": "Calibration",
    "metric": "Metric",
    "rank": "Rank",
    "signature_version": "Signature version",
    "id": "Id",
    "made": "Made",
}
_FEATURES = {
    "style": "style sketches, which compare LoRAs of any rank",
    "delta": "sketches of ΔW, which compare LoRAs of any rank",
    "theta": "θ, all factors A and B side by side: it serves one rank and one layout only",
    "canonical": "the canonical factors of ΔW: it serves one rank and one layout only",
}
#: Columns of the evaluation, where they have a figure.
_FIGURES = {
    "queries": "Queries",
    "plain": "Without a basis",
    "uncalibrated": "Uncalibrated",
    "cosine": "Uncalibrated, cosine",
    "calibrated": "Calibrated",
}


def config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without their long lists."""
    return {name: value for name, value in facts.items() if name not in LISTS}


def card(facts: Mapping[str, Any], name: str, pictures: Sequence[str] = ()) -> str:
    """The card, as Markdown with YAML front matter.

    name: ``hf:owner/name``, with ``@branch`` where it is not on the main one; pictures: names of
    the plots that lie beside the card.
    """
    parts = [
        f"---\n{_front(facts)}---",
        f"# {_line(facts['name'])}",
        _what(facts),
        _table(
            ("", ""),
            [(title, _value(facts[key])) for key, title in _ABOUT.items() if facts.get(key)],
        ),
        _use(name),
        _data(facts),
    ]
    if rows := facts.get("evaluation"):
        parts.append(_evaluation(rows))
    if pictures:
        shown = "\n\n".join(
            f"![{picture.rpartition('.')[0].replace('_', ' ')}]({picture})" for picture in pictures
        )
        parts.append(f"## Plots\n\n{shown}")
    return "\n\n".join(parts) + "\n"


def _front(facts: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {"library_name": "lorafind"}
    licence = str(facts.get("licence") or "")
    if _LICENCE.fullmatch(licence.lower()):
        front["license"] = licence.lower()
    elif licence:
        front |= {"license": "other", "license_name": _line(licence)}
    base = str(facts.get("base_model") or "")
    if _REPOSITORY.fullmatch(base):
        front["base_model"] = base
    front["tags"] = ["lorafind", "lora", "lora-similarity", facts["architecture"], facts["feature"]]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _what(facts: Mapping[str, Any]) -> str:
    feature = _FEATURES.get(facts["feature"], facts["feature"])
    by = f" of {facts['artists']} artists" if facts.get("artists") else ""
    return (
        "A basis for lorafind, a program that compares LoRA files by their weights alone: the mean "
        f"and {facts['components']} principal components of {facts.get('loras')} LoRAs{by} for "
        f"{facts['architecture']}, over {feature}."
    )


def _use(name: str) -> str:
    return (
        "## Use\n\n"
        "```sh\n"
        f"lorafind similar FILE --basis {name}    # once\n"
        f"lorafind basis use {name}               # from now on\n"
        "```\n\n"
        "A commit behind `@` pins these very bytes: `lorafind basis pull` prints the name with it. "
        f"Only `basis.safetensors` and `config.json` are downloaded, the SHA-256 is checked and a "
        "test vector inside the file is recomputed."
    )


def _data(facts: Mapping[str, Any]) -> str:
    said = _line(facts.get("data") or "Nothing is said of the LoRAs that it was made from.")
    return f"## Data\n\n{said}\n\nLicence: {_line(facts.get('licence') or 'not said')}."


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    have = [key for key in _FIGURES if any(row.get(key) is not None for row in rows)]
    body = [
        [_value(row.get("split")), _value(row.get("metric")), *(_value(row.get(k)) for k in have)]
        for row in rows
    ]
    head = ["Split", "Metric", *(_FIGURES[key] for key in have)]
    return f"## Evaluation\n\n{_table(head, body)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return _line(value).replace("|", "\\|")


def _line(value: Any) -> str:
    """Text on one line, without what Markdown or HTML would take for more than text."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)
