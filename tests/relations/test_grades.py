"""Grades, and relations as JSON."""

import json
import subprocess
import sys

import pytest

from lorafind.relations.grades import GRADES, Relation, Step, removal, weakest

RELATION = Relation(
    grade="resized",
    larger="x",
    steps=(
        Step("dtype", "F16", {"from": "F32", "to": "F16"}),
        Step("part", "text encoder dropped", {"modules": 72}),
        Step("resized", "resized 16→8", {"from": 16, "to": 8}),
    ),
    cosine=0.97,
    factor=1.0,
    shares=(0.8, 1.0),
    differs={"effective dtype": ["F32", "F16"], "rank": [16, 8]},
    dominates=(True, False),
    margin=0.7,
)


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        ("file", "default"),
        ("tensors", "default"),
        ("weights", "default"),
        ("cast", "named"),
        ("scaled", "named"),
        ("part", "named"),
        ("resized", "named"),
        ("reweighted", "never"),
        ("near", "never"),
        ("kin", "never"),
    ],
)
def test_what_may_go(grade: str, expected: str) -> None:
    assert removal(grade) == expected


def test_every_grade_is_decided() -> None:
    assert [removal(grade) for grade in GRADES].count("default") == 3
    with pytest.raises(ValueError, match="'copy' is not a grade"):
        removal("copy")


def test_only_what_is_dominated_may_go() -> None:
    assert RELATION.removable("y") == "named"
    assert RELATION.removable("x") == "never"


def test_the_weakest_step_names_the_relation() -> None:
    assert weakest(["weights", "part", "scaled"]) == "part"
    assert weakest([step.grade for step in RELATION.steps]) == "resized"


def test_json_and_back() -> None:
    assert Relation.from_json(json.loads(json.dumps(RELATION.to_json()))) == RELATION


def test_swapped() -> None:
    turned = RELATION.swapped()
    assert turned.larger == "y"
    assert turned.dominates == (False, True)
    assert turned.share == RELATION.share == 0.8
    assert turned.differs["rank"] == [8, 16]
    assert turned.steps == RELATION.steps
    assert turned.swapped() == RELATION


def test_text() -> None:
    assert RELATION.text() == "resized: F16, text encoder dropped, resized 16→8"
    assert Relation("tensors", None).text() == "tensors"


def test_stored_relations_are_read_without_torch() -> None:
    code = "import sys, lorafind.relations.grades; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
