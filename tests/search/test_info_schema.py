"""What ``info --json`` promises to other programs: every field, its type, and finite numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafind.files.outcome import OUTCOMES
from lorafind.formats.groups import GROUPS
from lorafind.search import info as module
from lorafind.search.info import KINDS, info
from tests.search.made_files import LAYERS, make, write

Check = Callable[[Any], bool]


def a(*types: type) -> Check:
    """One of these types; true and false are no numbers."""
    return lambda value: isinstance(value, types) and (bool in types or type(value) is not bool)


def maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def each(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def by(key: Check, check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(key(k) and check(v) for k, v in value.items())
    )


def one_of(*words: str) -> Check:
    return lambda value: value in words


def having(**fields: Check) -> Check:
    """Exactly these fields."""
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(check(value[name]) for name, check in fields.items())
    )


TEXT, COUNT, NUMBER = a(str), a(int), a(int, float)
HEX = maybe(lambda value: isinstance(value, str) and not set(value) - set("0123456789abcdef"))
PART = having(modules=COUNT, norm=maybe(NUMBER), share=maybe(NUMBER))
FIELDS: dict[str, Check] = {
    "path": TEXT,
    "outcome": one_of(*OUTCOMES),
    "reason": lambda value: isinstance(value, str) and "\n" not in value and len(value) <= 500,
    "read": one_of("all", "header"),
    "size": maybe(COUNT),
    "name": TEXT,
    "architecture": maybe(TEXT),
    "candidates": each(TEXT),
    "family": maybe(TEXT),
    "spelling": maybe(TEXT),
    "rank": maybe(COUNT),
    "ranks": by(str.isdecimal, COUNT),
    "alpha": maybe(NUMBER),
    "alphas": by(TEXT, COUNT),
    "scale": maybe(NUMBER),
    "dtype": maybe(TEXT),
    "effective_dtype": maybe(TEXT),
    "modules": maybe(COUNT),
    "zero_modules": maybe(COUNT),
    "parameters": maybe(COUNT),
    "norm": maybe(NUMBER),
    "groups": by(one_of(*GROUPS), PART),
    "components": by(TEXT, PART),
    "per_module": each(
        having(
            name=TEXT,
            group=one_of(*GROUPS),
            family=TEXT,
            parameters=a(bool),
            shape=each(COUNT),
            rank=COUNT,
            alpha=maybe(NUMBER),
            scale=maybe(NUMBER),
            norm=maybe(NUMBER),
            magnitude=maybe(NUMBER),
        )
    ),
    "magnitudes": each(having(module=TEXT, key=TEXT, numbers=COUNT, norm=maybe(NUMBER))),
    "embeddings": each(having(name=TEXT, tensors=each(TEXT), vectors=COUNT, width=COUNT)),
    "extras": by(TEXT, TEXT),
    "unknown_keys": each(TEXT),
    "unread_keys": each(TEXT),
    "key_counts": lambda value: value == {} or list(value) == list(KINDS),
    "facts": having(
        title=maybe(TEXT),
        output_name=maybe(TEXT),
        base_model=maybe(TEXT),
        base_model_name=maybe(TEXT),
        base_model_hash=maybe(TEXT),
        prediction=maybe(TEXT),
        network_module=maybe(TEXT),
        dim=maybe(TEXT),
        alpha=maybe(TEXT),
        trigger_words=each(TEXT),
        tags=each(lambda pair: len(pair) == 2 and TEXT(pair[0]) and COUNT(pair[1])),
        session_id=maybe(TEXT),
        seed=maybe(TEXT),
        steps=maybe(COUNT),
        epoch=maybe(COUNT),
        started_at=maybe(NUMBER),
        finished_at=maybe(NUMBER),
        comment=maybe(TEXT),
        merged_from=maybe(TEXT),
    ),
    "config": lambda value: isinstance(value, dict) and value.keys() <= set(module.SETTINGS),
    "hints": by(TEXT, lambda value: True),
    "sidecar": having(
        name=maybe(TEXT),
        base_model=maybe(TEXT),
        trigger_words=each(TEXT),
        tags=each(TEXT),
        preview=maybe(TEXT),
        notes=maybe(TEXT),
        weight=maybe(NUMBER),
        sha256=HEX,
        files=each(TEXT),
        broken=each(each(TEXT)),
    ),
    "notes": each(TEXT),
    "hashes": lambda value: (
        value == {}
        or having(
            sha256=HEX,
            autov1=HEX,
            autov2=HEX,
            autov3=HEX,
            sshs_model_hash=HEX,
            sshs_legacy_hash=HEX,
            content=HEX,
        )(value)
    ),
    "recorded": each(having(name=TEXT, value=TEXT, stale=maybe(a(bool)))),
}
ASKED: dict[str, Check] = {
    "keys": by(TEXT, lambda how: how.partition(":")[0] in (*KINDS, "unread")),
    "tensors": by(TEXT, having(dtype=TEXT, shape=each(COUNT), bytes=COUNT)),
}


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check(row: dict[str, Any]) -> None:
    """Fails unless a row with everything asked for is as promised."""
    row = json.loads(json.dumps(row))
    checks = FIELDS | ASKED
    assert row.keys() == checks.keys()
    for name, right in checks.items():
        assert right(row[name]), (row["path"], name, row[name])
    assert finite(row), row["path"]
    assert (row["reason"] == "") == (row["outcome"] == "lora")
    assert row["keys"].keys() == row["tensors"].keys()
    counted = [how.partition(":")[0] for how in row["keys"].values()]
    assert all(counted.count(kind) == n for kind, n in row["key_counts"].items())
    understood = row["architecture"] is not None
    assert understood == bool(row["candidates"]) == bool(row["key_counts"])
    if understood:
        assert len(row["per_module"]) == row["modules"]
        assert row["candidates"] == row["architecture"].split("-or-")


@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "full"])
def test_made_files(tmp_path: Path, family: str) -> None:
    tensors, _ = make(family, 1)
    tensors["bundle_emb.word.string_to_param.*"] = torch.ones(4, 768)
    tensors[f"{next(iter(LAYERS.values()))[0]}.dora_scale"] = torch.full((320, 1), math.nan)
    facts = {
        "ss_training_started_at": "1e11",
        "ss_training_finished_at": "1e300",
        "ss_tag_frequency": json.dumps({"a": {"x": 10**4000, "y": 2}}),
        "sshs_model_hash": "ab",
    }
    path = write(tmp_path / "a.safetensors", tensors, facts)
    (tmp_path / "a.json").write_text('{"preferred weight": 1e999, "activation text": "a, b"}')
    check(info(path, keys=True, modules=True))
    check(info(path, header_only=True, keys=True, modules=True))


def test_files_of_others(shared: Path) -> None:
    paths = [*(shared / "loras/real").iterdir(), *(shared / "loras/malformed").iterdir()]
    for path in paths:
        check(info(path, allow_pickle=True, keys=True, modules=True))
        check(info(path, header_only=True, keys=True, modules=True))


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        check(info(path, keys=True, modules=True))


def test_every_field_is_documented() -> None:
    told = info.__doc__ or ""
    for name in {**FIELDS, **ASKED}:
        assert f"{name}:" in told or f"{name};" in told or f"{name}, " in told, name
