"""What ``whatis`` says of indexed and of unknown files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from lorafind.search.telling import text, topics
from lorafind.search.whatis import Answer, whatis
from tests.search import small

HERO = small.random(1)
HALF = small.each(HERO, lambda m: m.astype("f2"))
PART = dict(list(HERO.items())[:9])
KIN = small.turned(HERO, small.random(2), 40)
TOLD = {
    "ss_sd_model_name": "base.safetensors",
    "modelspec.trigger_phrase": "hero, cape",
    "ss_session_id": "42",
}


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with metadata, a half-precision cast, a lower rank and a stranger of it."""
    folder = tmp_path_factory.mktemp("whatis")
    small.save(folder / "loras" / "hero.safetensors", HERO, TOLD)
    small.save(folder / "loras" / "half.safetensors", HALF)
    small.save(folder / "loras" / "low.safetensors", small.resized(HERO, 2))
    small.save(folder / "loras" / "stranger.safetensors", small.random(7))
    small.save(folder / "loras" / "zero.safetensors", small.each(HERO, np.zeros_like))
    small.index(folder / "i.db", folder / "loras")
    return folder / "i.db"


def look(db: Path, target: Path | str, **options: Any) -> Answer:
    with Store.open(db) as store:
        return whatis(store, str(target), **options)


def found(answer: Answer) -> list[tuple[str, str, str | None]]:
    return [(Path(r.path).stem, r.text, r.larger) for r in answer.relations]


def test_an_indexed_file(db: Path) -> None:
    path = db.parent / "loras" / "hero.safetensors"
    answer = look(db, path)
    assert answer == look(db, "hero")
    assert (answer.indexed, answer.presence, answer.outcome) == (True, "here", "lora")
    assert (answer.architecture, answer.family, answer.rank) == ("sd1", "lora", "4")
    assert (answer.dtype, answer.modules, answer.size) == ("F32", 12, path.stat().st_size)
    assert (answer.base_model, answer.trigger_words) == ("base.safetensors", ("hero", "cape"))
    assert found(answer) == [
        ("half", "weights: F16", "this"),
        ("low", "resized: resized 4→2", "this"),
    ]
    assert answer.relations[1].cosine == pytest.approx(small.cosine(HERO, small.resized(HERO, 2)))
    assert [Path(row["path"]).stem for row in answer.nearest] == ["stranger"]
    # It says so itself: nothing is to be guessed.
    assert (answer.likely_base, answer.likely_trigger_words) == (None, None)
    assert topics(answer) == {
        "What": "It is a LoRA for sd1 (family lora, rank 4, F32, 12 modules).",
        "Says": "It is called 'hero', names the base model base.safetensors and gives the trigger "
        "words hero, cape.",
        "Related": "half.safetensors is the same LoRA as it (F16). low.safetensors is a resize of "
        "it (resized 4→2).",
        "Style": "Nearest in style is stranger.safetensors (score "
        f"{answer.nearest[0]['score']:.2f}); none stands out.",
    }


def test_guesses_come_from_the_closest_that_says_something(db: Path) -> None:
    answer = look(db, "low")
    hero = str(db.parent / "loras" / "hero.safetensors")
    because = "resized: resized 4→2"
    assert answer.to_json()["likely_base"] == {
        "value": "base.safetensors",
        "from": hero,
        "because": because,
    }
    assert answer.to_json()["likely_trigger_words"] == {
        "value": ("hero", "cape"),
        "from": hero,
        "because": because,
    }
    assert text(answer).endswith(
        "Its likely base model: base.safetensors, a guess from hero.safetensors (resized: resized "
        "4→2). Its likely trigger words: hero, cape, a guess from hero.safetensors (resized: "
        "resized 4→2)."
    )


def test_a_strangers_base_says_nothing(tmp_path: Path) -> None:
    small.save(tmp_path / "a.safetensors", HERO, TOLD)
    small.save(tmp_path / "b.safetensors", small.random(7))
    small.index(tmp_path / "i.db", tmp_path)
    answer = look(tmp_path / "i.db", "b")
    assert [row["base_model"] for row in answer.nearest] == ["base.safetensors"]
    assert (answer.likely_base, answer.likely_trigger_words) == (None, None)


def test_pairs_that_index_passed_over_stay_untold(tmp_path: Path) -> None:
    """``index`` leaves pairs of a crowded family unproved: no estimate stands in for them."""
    small.save(tmp_path / "loras" / "a.safetensors", HERO)
    small.save(tmp_path / "loras" / "b.safetensors", KIN)
    small.index(tmp_path / "i.db", tmp_path / "loras")
    assert found(look(tmp_path / "i.db", "a")) == [("b", "kin", None)]
    with Store.open(tmp_path / "i.db", "write") as store, store.batch():
        store.conn.execute("DELETE FROM relations")
    small.save(tmp_path / "loras" / "c.safetensors", small.turned(HERO, small.random(9), 30))
    small.index(tmp_path / "i.db", relate=False)
    assert found(look(tmp_path / "i.db", "a")) == [("c", "~likely", None)]
    assert {name for name, _, _ in found(look(tmp_path / "i.db", "c"))} == {"a", "b"}


@pytest.mark.parametrize(
    ("made", "relation"),
    [
        (HALF, ("half", "tensors", None)),
        (PART, ("hero", "part: 3 of 12 modules dropped", "other")),
        (small.resized(HERO, 3), ("hero", "resized: resized 4→3", "other")),
        (small.each(HERO, lambda m: 2 * m), ("hero", "scaled: ×0.25 (use at ×4)", "this")),
        (KIN, ("hero", "kin", None)),
    ],
    ids=["tensors", "part", "resized", "scaled", "kin"],
)
def test_an_unknown_file_is_proved(
    db: Path, tmp_path: Path, made: small.Factors, relation: tuple[str, str, str | None]
) -> None:
    path = small.save(tmp_path / "mystery.safetensors", made, {"ss_session_id": "42"})
    answer = look(db, path)
    assert (answer.outcome, answer.indexed, answer.name) == ("lora", False, "mystery")
    assert found(answer)[0] == relation
    first = answer.relations[0]
    assert first.same_run == (relation[0] == "hero")
    stored = {"hero": HERO, "half": HALF}[relation[0]]
    assert first.cosine == pytest.approx(small.cosine(made, stored), abs=1e-6)
    assert answer.likely_base is not None
    assert answer.likely_base.value == "base.safetensors"
    assert "stranger" not in {stem for stem, _, _ in found(answer)}


def test_the_share_of_a_part(db: Path, tmp_path: Path) -> None:
    path = small.save(tmp_path / "part.safetensors", PART)
    answer = look(db, path)
    first = answer.relations[0]
    share = small.norm(PART) ** 2 / small.norm(HERO) ** 2
    assert first.share == pytest.approx(share, rel=1e-5)
    assert (
        f"It is a part of hero.safetensors ({first.steps[0]}, {share:.1%} of ‖ΔW‖² kept)."
        in text(answer)
    )


def test_a_copy_of_an_indexed_file_is_not_read_as_a_lora(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "mystery.safetensors"
    shutil.copy(db.parent / "loras" / "low.safetensors", path)
    answer, original = look(db, path), look(db, "low")
    assert answer.copies == (original.path,)
    assert (answer.indexed, answer.path, answer.name) == (False, str(path), "mystery")
    assert answer.relations == original.relations
    assert "Its bytes are those of low.safetensors." in text(answer)
    # A link to a file is no copy of it.
    link = tmp_path / "link.safetensors"
    link.symlink_to(original.path)
    assert look(db, link).copies == ()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = small.save(tmp_path / "loras" / "a.safetensors", HERO)
    small.save(tmp_path / "loras" / "b.safetensors", small.random(7))
    small.index(tmp_path / "i.db", tmp_path / "loras")
    small.save(path, small.random(8, 2))
    answer = look(tmp_path / "i.db", path)
    assert (answer.indexed, answer.rank, answer.relations) == (False, "2", ())


def test_what_cannot_be_proved_is_likely(tmp_path: Path) -> None:
    small.save(tmp_path / "drive" / "hero.safetensors", HERO)
    small.save(tmp_path / "loras" / "near.safetensors", small.turned(HERO, small.random(2), 5))
    small.save(tmp_path / "loras" / "stranger.safetensors", small.random(7))
    small.index(tmp_path / "i.db", tmp_path / "drive", tmp_path / "loras", relate=False)
    # Nothing was proved by `index` yet.
    (likely,) = look(tmp_path / "i.db", "near").relations
    assert (Path(likely.path).stem, likely.grade, likely.larger) == ("hero", "~likely", None)
    assert likely.cosine == pytest.approx(np.cos(np.radians(5)), abs=0.05)
    (tmp_path / "drive").rename(tmp_path / "unplugged")
    path = small.save(tmp_path / "mystery.safetensors", HALF)
    answer = look(tmp_path / "i.db", path)
    assert [(Path(r.path).stem, r.grade) for r in answer.relations] == [
        ("near", "near"),
        ("hero", "~likely"),
    ]
    assert answer.missing == (str(tmp_path / "drive" / "hero.safetensors"),)
    said = topics(answer)["Related"]
    assert "It is ~likely related to hero.safetensors (not there now) (~1.00)" in said
    assert "which is not proved" in said


def test_what_is_no_lora(db: Path, tmp_path: Path) -> None:
    zero = look(db, "zero")
    assert (zero.outcome, zero.indexed, zero.architecture) == ("zero", True, None)
    assert text(zero).startswith("No usable LoRA (zero): its ΔW is zero")
    copy = shutil.copy(zero.path, tmp_path / "other.safetensors")
    again = look(db, copy)
    assert (again.outcome, again.indexed, again.copies) == ("zero", False, (zero.path,))
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html></html>")
    assert look(db, page).outcome == "html"
    assert look(db, tmp_path).outcome == "not-a-file"
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    assert look(db, tmp_path / "dangling.safetensors").outcome == "inaccessible"
    with pytest.raises(IndexProblem, match="neither a file nor a name"):
        look(db, "nobody")


def test_a_deleted_file_is_told_from_the_index(tmp_path: Path) -> None:
    path = small.save(tmp_path / "loras" / "a.safetensors", HERO)
    small.save(tmp_path / "loras" / "b.safetensors", HALF)
    small.index(tmp_path / "i.db", tmp_path / "loras")
    path.unlink()
    small.index(tmp_path / "i.db")
    answer = look(tmp_path / "i.db", path)
    assert (answer.presence, answer.size, found(answer)) == (
        "gone",
        None,
        [("b", "weights: F16", "this")],
    )
    assert "12 modules); the file is gone." in text(answer)


def test_a_pickle_needs_leave(shared: Path, db: Path) -> None:
    real = shared / "loras" / "real"
    refused = look(db, real / "sd1_cloneofsimo_analog_svd_distill.text_encoder.pt")
    assert refused.outcome == "pickle"
    read = look(db, refused.path, allow_pickle=True)
    assert (read.outcome, read.architecture) == ("lora", "sd1")


def test_neighbours_in_style_are_of_one_font(shared: Path, tmp_path: Path) -> None:
    """Trainings of a font that the index has not seen find others of it, and what those say."""
    wild = shared / "loras" / "fontbench" / "wild"
    train = sorted(wild.glob("*-train-*"))
    fonts = sorted({path.name.partition("-train-")[0] for path in train})[:6]
    (tmp_path / "loras").mkdir()
    for path in train:
        font = path.name.partition("-train-")[0]
        if font in fonts:
            told = {"ss_sd_model_name": font}
            save_file(load_file(path), tmp_path / "loras" / path.name, told)
    small.index(tmp_path / "i.db", tmp_path / "loras")
    hits, guesses = [], 0
    for font in fonts:
        answer = look(tmp_path / "i.db", wild / f"{font}-test_same-01.safetensors", count=1)
        assert answer.architecture is not None and answer.architecture.startswith("other:")
        assert answer.relations == ()
        (nearest,) = answer.nearest
        hits.append(Path(nearest["path"]).name.startswith(font))
        if answer.likely_base is not None:
            assert answer.likely_base.because == "nearest in style"
            assert answer.likely_base.path == nearest["path"]
            assert (answer.likely_base.value == font) == hits[-1]
        z, score = nearest["z"], nearest["score"]
        assert (answer.likely_base is not None) == (score >= 0.5 if z is None else z >= 3)
        guesses += answer.likely_base is not None
    assert sum(hits) >= 5
    assert guesses >= 3
