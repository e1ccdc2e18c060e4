"""Which rows ``ls`` gives, and what is in them."""

from pathlib import Path
from typing import Any

import pytest

from lorafind.index.store import Store
from lorafind.search.ls import Filters, listing, parse_ranks, words
from tests.search import small


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders: LoRAs of three ranks, a copy, a zero one, a broken one, a deleted one, and one
    folder that was taken away."""
    folder = tmp_path_factory.mktemp("ls")
    loras, drive = folder / "loras", folder / "drive"
    told = {
        "modelspec.title": "Rainy Day",
        "ss_sd_model_name": "base.safetensors",
        "modelspec.trigger_phrase": "rainpic, wet Street",
    }
    small.save(loras / "b" / "rain.safetensors", small.random(1, 4), told)
    small.save(loras / "a.safetensors", small.random(2, 8))
    mixed = small.random(3, 4)
    key = next(iter(mixed))
    mixed[key] = small.random(4, 16)[key]
    small.save(loras / "mixed.safetensors", small.each(mixed, lambda m: m.astype("f2")))
    (loras / "copy.safetensors").write_bytes((loras / "a.safetensors").read_bytes())
    small.save(loras / "zero.safetensors", small.each(small.random(5), lambda m: 0 * m))
    (loras / "cut.safetensors").write_bytes((loras / "a.safetensors").read_bytes()[:-7])
    small.save(loras / "old.safetensors", small.random(6))
    small.save(drive / "away.safetensors", small.random(7))
    small.index(folder / "i.db", loras, drive)
    (loras / "old.safetensors").unlink()
    drive.rename(folder / "unplugged")
    small.index(folder / "i.db")
    return folder / "i.db"


def rows(db: Path, **filters: Any) -> list[dict[str, Any]]:
    with Store.open(db) as store:
        return list(listing(store, Filters(**filters)))


def names(db: Path, **filters: Any) -> list[str]:
    return [Path(row["path"]).name for row in rows(db, **filters)]


def test_the_loras_that_are_there_come_by_path(db: Path) -> None:
    found = [Path(row["path"]).relative_to(db.parent / "loras").as_posix() for row in rows(db)]
    assert found == [f"{name}.safetensors" for name in ("a", "b/rain", "copy", "mixed")]


def test_a_row(db: Path) -> None:
    (row,) = rows(db, texts=["rain"])
    path = db.parent / "loras" / "b" / "rain.safetensors"
    digests = {key: row.pop(key) for key in ("sha256", "content")}
    assert all(len(digest) == 64 for digest in digests.values())
    assert row == {
        "path": str(path),
        "architecture": "sd1",
        "family": "lora",
        "rank": "4",
        "dtype": "F32",
        "size": path.stat().st_size,
        "name": "Rainy Day",
        "trigger_words": ["rainpic", "wet Street"],
        "base_model": "base.safetensors",
        "status": "lora",
        "outcome": "lora",
        "reason": "",
        "effective_dtype": "F32",
        "spelling": "kohya",
        "link": False,
    }


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"status": ["zero"]}, ["zero"]),
        ({"status": ["gone"]}, ["old"]),
        ({"status": ["offline"]}, ["away"]),
        ({"status": ["refused"]}, ["cut", "zero"]),
        ({"status": ["gone", "unreadable"]}, ["cut", "old"]),
        ({"status": ["all"]}, ["away", "a", "rain", "copy", "cut", "mixed", "old", "zero"]),
        ({"ranks": (16, 16)}, ["mixed"]),
        ({"ranks": (4, 7)}, ["rain", "mixed"]),
        ({"ranks": (5, 2**31)}, ["a", "copy", "mixed"]),
        ({"ranks": (5, 7)}, []),
        ({"architectures": ["SD1"], "families": ["LoRA"]}, ["a", "rain", "copy", "mixed"]),
        ({"architectures": ["sdxl"]}, []),
        ({"families": ["loha", "lokr"]}, []),
        ({"texts": ["DAY"]}, ["rain"]),
        ({"texts": ["STREET", "rainy"]}, ["rain"]),
        ({"texts": ["street", "copy"]}, []),
        ({"texts": ["b/"]}, ["rain"]),
        # The place of the whole collection is no name of a file.
        ({"texts": ["loras"]}, []),
    ],
)
def test_filters(db: Path, filters: dict[str, Any], found: list[str]) -> None:
    assert names(db, **filters) == [f"{name}.safetensors" for name in found]


def test_a_range_of_ranks_and_a_reason_are_shown(db: Path) -> None:
    (mixed,) = rows(db, texts=["mixed"])
    assert (mixed["rank"], mixed["dtype"]) == ("4–16", "F16")
    (cut,) = rows(db, status=["unreadable"])
    assert cut["reason"] and cut["architecture"] is None and cut["rank"] is None
    (old,) = rows(db, status=["gone"])
    assert (old["status"], old["outcome"], old["rank"]) == ("gone", "lora", "4")


@pytest.mark.parametrize(
    ("text", "ranks"), [("16", (16, 16)), ("8-32", (8, 32)), ("-8", (0, 8)), ("64-", (64, 2**31))]
)
def test_ranges(text: str, ranks: tuple[int, int]) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", "-", "a", "1-2-3", "32-8", "1.5", "--8"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="no ran"):
        parse_ranks(text)


def test_words(db: Path) -> None:
    with Store.open(db) as store:
        assert words(store) == {
            "architecture": ["sd1"],
            "family": ["lora"],
            "status": ["gone", "lora", "offline", "unreadable", "zero"],
        }


def test_unknown_models_share_a_word(shared: Path, tmp_path: Path) -> None:
    fonts = sorted((shared / "loras" / "fontbench" / "thin").glob("*.safetensors"))[:2]
    small.save(tmp_path / "sd1.safetensors", small.random(1))
    small.index(tmp_path / "i.db", *fonts, tmp_path / "sd1.safetensors", relate=False)
    assert names(tmp_path / "i.db", architectures=["other"]) == [path.name for path in fonts]
    own = rows(tmp_path / "i.db", architectures=["other"])[0]["architecture"]
    assert own.startswith("other:")
    assert len(names(tmp_path / "i.db", architectures=[own, "sd1"])) == 3
    # A root that is a single file is found by its name.
    assert names(tmp_path / "i.db", texts=["SD1.safe"]) == ["sd1.safetensors"]
