"""Whatever an edited plan says, every LoRA of the collection keeps a whole copy where it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafind.clean.problem import CleanProblem
from tests.clean.conftest import Shelf, snapshot

FILES = [f"{n}/{name}.safetensors" for n in range(2) for name in ("keep", "copy", "half")]
WHOLE = [{"0/keep.safetensors", "0/copy.safetensors"}, {"1/keep.safetensors", "1/copy.safetensors"}]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(FILES), st.booleans()), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(("move", "trash", "link")),
)
def test_any_edit(shelf: Shelf, groups: list[list[tuple[str, bool]]], kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(shelf.top / "data"))
        before = snapshot(shelf.loras)

        def edit(plan: dict[str, Any]) -> None:
            rows = {row["path"]: row for group in plan["groups"] for row in group["files"]}
            plan["grades"] = ["weights", "cast", "near", "kin"]
            plan["groups"] = [
                {
                    "files": [
                        {**rows[str(shelf.loras / path)], "act": "remove" if gone else "keep"}
                        for path, gone in group
                    ]
                }
                for group in groups
            ]

        path = shelf.edit(edit)
        try:
            done = shelf.apply(path, kind)
        except CleanProblem:
            assert snapshot(shelf.loras) == before
            return
        now = snapshot(shelf.loras)
        for copies in WHOLE:
            # F32; the F16 of the group holds less.
            assert any(now.get(copy) == before[copy] for copy in copies)
        for name, row in done.items():
            if row.outcome in ("moved", "trashed"):
                assert name not in now
                with open(row.to, "rb") as file:
                    assert len(file.read()) == row.bytes
            elif row.outcome == "stays":
                assert now[name][0] == before[name][0]
        shelf.undo()
        assert snapshot(shelf.loras) == before
        assert json.loads(path.read_text())["lorafind_plan"] == 1
