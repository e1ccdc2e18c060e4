"""Series of one run: which files are found to be one, their order, numbers and proposals."""

import os
from pathlib import Path
from typing import Any

import pytest

from lorafind.index.rows import Relation
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.search.epochs import KEEP, PASS, Epoch, epochs
from lorafind.search.names import Spot, spot
from tests.search import small

#: File name → angle to the last one, in degrees.
STYLE = {"style-000002": 60, "style-000004": 40, "style-000006": 20, "style-000008": 10, "style": 0}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/Style-000010.safetensors", Spot("Style", epoch=10)),
        ("/a/Style.safetensors", Spot("Style")),
        ("/a/s-step00000500.safetensors", Spot("s", step=500)),
        ("/a/s_000000500.safetensors", Spot("s", step=500)),
        ("/a/s-e10.safetensors", Spot("s", epoch=10)),
        ("/a/s_Epoch_10_step500.safetensors", Spot("s", epoch=10, step=500)),
        ("/a/s-500-steps.safetensors", Spot("s", step=500)),
        ("/a/s 3.safetensors", Spot("s", number=3)),
        ("/a/s_v2.safetensors", Spot("s_v2")),
        ("/a/run/checkpoint-500/pytorch_lora_weights.safetensors", Spot("/a/run", step=500)),
        ("/a/run/pytorch_lora_weights.safetensors", Spot("/a/run")),
        ("/a/run/epoch10.safetensors", Spot("/a/run", epoch=10)),
        ("/a/run/0004.safetensors", Spot("/a/run", number=4)),
        ("/a/run-step500/adapter_model.safetensors", Spot("/a/run", step=500)),
    ],
)
def test_what_names_say(path: str, expected: Spot) -> None:
    assert spot(path) == expected
    assert expected.numbered == (
        path not in ("/a/Style.safetensors", "/a/s_v2.safetensors") and "run/pytorch" not in path
    )


def steps(seed: int, angles: dict[str, int]) -> dict[str, small.Factors]:
    """File name → factors of one run."""
    last, other = small.random(seed), small.random(seed + 1000)
    return {name: small.turned(last, other, angle) for name, angle in angles.items()}


def session(name: str, number: int, epoch: int) -> dict[str, Any]:
    return {
        "ss_session_id": f"{name}-1",
        "ss_output_name": name,
        "ss_epoch": str(epoch),
        "ss_steps": str(100 * epoch),
    }


def series(db: Path, **options: Any) -> list[list[Epoch]]:
    with Store.open(db) as store:
        return list(epochs(store, **options))


def short(rows: list[Epoch]) -> list[tuple[str, str, str]]:
    return [(Path(row.path).stem, row.at, row.proposal) for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, small.Factors]]:
    """A run with a session id, its files written in no order and under other names."""
    folder = tmp_path_factory.mktemp("run")
    made = steps(1, STYLE)
    renamed = dict(zip(made, ("x", "b", "style-000006", "a", "c"), strict=True))
    for number, (name, found) in enumerate(made.items()):
        path = folder / "loras" / f"{renamed[name]}.safetensors"
        small.save(path, found, session("style", 1, 2 * number + 2))
    small.save(folder / "loras" / "stranger.safetensors", small.random(77))
    small.index(folder / "i.db", folder / "loras")
    return folder / "i.db", made


def test_a_session_in_order_with_exact_numbers(
    run: tuple[Path, dict[str, small.Factors]],
) -> None:
    db, made = run
    ((*rows,),) = series(db)
    assert short(rows) == [
        ("x", "epoch 2, step 200", PASS),
        ("b", "epoch 4, step 400", KEEP),
        ("style-000006", "epoch 6, step 600", PASS),
        ("a", "epoch 8, step 800", PASS),
        ("c", "epoch 10, step 1000", KEEP),
    ]
    found = list(made.values())
    for place, row in enumerate(rows):
        assert row.norm == pytest.approx(small.norm(found[place]), rel=1e-5)
        assert row.cosine == pytest.approx(small.cosine(found[place], found[-1]), abs=1e-6)
        if place:
            change = 1 - small.cosine(found[place], found[place - 1])
            assert row.change == pytest.approx(change, abs=1e-6)
        assert (row.series, row.by, row.session) == ("style", "session", "style-1")
        assert (row.position, row.of, row.estimated) == (place + 1, 5, ())
    assert rows[0].change is None
    to_b = small.cosine(found[0], found[1])
    to_c = small.cosine(found[1], found[4])
    assert [row.reason for row in rows] == [
        f"much like b.safetensors: cosine {to_b:.3f}",
        f"really different: cosine {to_c:.3f} to c.safetensors, the most like it of those kept",
        f"much like c.safetensors: cosine {small.cosine(found[2], found[4]):.3f}",
        f"much like c.safetensors: cosine {small.cosine(found[3], found[4]):.3f}",
        "the last of the series",
    ]


@pytest.mark.parametrize(
    ("threshold", "kept"), [(-1.0, "c"), (0.6, "xc"), (0.95, "xbsc"), (1.0, "xbsac")]
)
def test_the_threshold(
    run: tuple[Path, dict[str, small.Factors]], threshold: float, kept: str
) -> None:
    (rows,) = series(run[0], threshold=threshold)
    assert "".join(Path(r.path).name[0] for r in rows if r.proposal == KEEP) == kept


def test_only_the_series_of_some(run: tuple[Path, dict[str, small.Factors]]) -> None:
    with Store.open(run[0]) as store:
        ids = dict(store.conn.execute("SELECT CAST(path AS TEXT), lora FROM files"))
    assert series(run[0], only={ids["stranger.safetensors"]}) == []
    assert len(series(run[0], only={ids["a.safetensors"]})[0]) == 5


@pytest.mark.parametrize("relate", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ["toon-step00000500", "toon-step00001000", "toon"],
        [f"run/{step}pytorch_lora_weights" for step in ("checkpoint-500/", "checkpoint-1000/", "")],
        ["Toon_e3", "toon_e12", "TOON"],
    ],
)
def test_names_and_weights_make_a_series(tmp_path: Path, names: list[str], relate: bool) -> None:
    made = steps(5, dict(zip(names, (35, 15, 0), strict=True)))
    for name, found in reversed(made.items()):
        small.save(tmp_path / "loras" / f"{name}.safetensors", found)
    # One name and numbers, but nothing in common.
    for number in range(4):
        small.save(
            tmp_path / "loras" / f"solo-00000{number}.safetensors", small.random(50 + number)
        )
    small.index(tmp_path / "i.db", tmp_path / "loras", relate=relate)
    (rows,) = series(tmp_path / "i.db")
    below = [os.path.relpath(row.path, tmp_path / "loras") for row in rows]
    assert below == [f"{name}.safetensors" for name in names]
    assert [row.proposal for row in rows] == [KEEP, PASS, KEEP]
    assert rows[0].by == "name" and rows[2].at == "last"
    exact = small.cosine(made[names[0]], made[names[2]])
    assert rows[0].cosine == pytest.approx(exact, abs=1e-6 if relate else 0.1)
    assert [row.estimated for row in rows] == (
        [(), (), ()] if relate else [("cosine",), ("cosine", "change"), ("change",)]
    )
    assert ("~" in rows[0].reason) is not relate


def test_a_pair_that_was_checked_is_not_joined_by_an_estimate(tmp_path: Path) -> None:
    for name, found in steps(5, {"a-000001": 20, "a": 0}).items():
        small.save(tmp_path / f"{name}.safetensors", found)
    small.index(tmp_path / "i.db", tmp_path, relate=False)
    assert len(series(tmp_path / "i.db")) == 1
    with Store.open(tmp_path / "i.db", "write") as store, store.batch():
        store.put_relations([Relation(1, 2, RELATION_VERSION)])
    assert series(tmp_path / "i.db") == []


def test_the_trainers_counts_make_a_series_without_names(tmp_path: Path) -> None:
    made = steps(5, {"first": 30, "second": 0})
    made["third"] = small.turned(made["second"], small.random(9), 20)
    told = [("100", "one"), ("200", "one"), ("300", "trained on from it")]
    for (count, name), (stem, found) in zip(told, made.items(), strict=True):
        facts = {"ss_steps": count, "ss_output_name": name}
        small.save(tmp_path / f"{stem}.safetensors", found, facts)
    small.index(tmp_path / "i.db", tmp_path)
    (rows,) = series(tmp_path / "i.db")
    assert [(row.series, row.at) for row in rows] == [("one", "step 100"), ("one", "step 200")]


def test_two_sessions_stay_apart_whatever_their_names(tmp_path: Path) -> None:
    made = steps(5, {"a-000001": 20, "a-000002": 10, "a": 0})
    for number, (name, found) in enumerate(made.items()):
        told = session("a", number, number) | {"ss_session_id": str(number)}
        small.save(tmp_path / f"{name}.safetensors", found, told)
    small.index(tmp_path / "i.db", tmp_path)
    assert series(tmp_path / "i.db") == []


def test_casts_of_an_epoch_are_versions_of_it(tmp_path: Path) -> None:
    made = steps(5, {"a-000001": 50, "a": 0})
    half = small.each(made["a"], lambda m: m.astype("f2"))
    small.save(tmp_path / "a-000001.safetensors", made["a-000001"], session("a", 1, 1))
    small.save(tmp_path / "a.safetensors", made["a"], session("a", 1, 2))
    small.save(tmp_path / "a-fp16.safetensors", half, session("a", 1, 2))
    small.index(tmp_path / "i.db", tmp_path)
    (rows,) = series(tmp_path / "i.db")
    # The finer of two at one step is the last.
    assert [Path(row.path).stem for row in rows] == ["a-000001", "a-fp16", "a"]
    assert [row.proposal for row in rows] == [KEEP, PASS, KEEP]
    assert rows[1].reason == "another version of a.safetensors (weights: F16)"
    (tmp_path / "a-000001.safetensors").unlink()
    small.index(tmp_path / "i.db")
    # What is left is one epoch, twice.
    assert series(tmp_path / "i.db") == []


def test_a_deleted_epoch_is_left_out_and_an_offline_one_is_not(tmp_path: Path) -> None:
    made = steps(5, STYLE)
    for place, (name, found) in enumerate(made.items()):
        folder = tmp_path / ("drive" if place == 1 else "loras")
        small.save(folder / f"{name}.safetensors", found)
    small.index(tmp_path / "i.db", tmp_path / "drive", tmp_path / "loras")
    (tmp_path / "drive").rename(tmp_path / "unplugged")
    (tmp_path / "loras" / "style-000006.safetensors").unlink()
    small.index(tmp_path / "i.db")
    (rows,) = series(tmp_path / "i.db")
    assert [(row.epoch, row.presence) for row in rows] == [
        (2, "here"),
        (4, "offline"),
        (8, "here"),
        (None, "here"),
    ]


def test_trainings_of_one_font_are_no_epochs(shared: Path, tmp_path: Path) -> None:
    """One style, one start, numbered names: eight runs, not eight epochs of one."""
    fonts = sorted((shared / "loras" / "fontbench" / "fixed").glob("3dlet-train-*"))
    assert len(fonts) == 8
    small.index(tmp_path / "i.db", *fonts)
    assert series(tmp_path / "i.db") == []
