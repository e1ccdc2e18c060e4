"""``lorafind eval`` on small planted collections."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lorafind.cli.app import Group, make_app
from lorafind.cli.eval import COLUMNS
from lorafind.evaluation.protocol import Row
from lorafind.report.tables import tables
from tests.evaluation.planted import collection


class EvalGroup(Group):
    """The real group with this command alone."""

    panels = MappingProxyType({"Bases": ("eval",)})


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(make_app(EvalGroup), ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loras") / "made"
    collection(place, uniform=True, artists=4, each=10)
    return place


SHORT = ("--features", "style,theta", "--components", "3,6")


def test_one_long_table(folder: Path) -> None:
    result = call(folder, *SHORT, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert all(list(row) == [column.key for column in COLUMNS] for row in rows)
    assert {row["table"] for row in rows} == {"protocol", "unseen", "drift"}
    protocol = [row for row in rows if row["table"] == "protocol"]
    # Without components: 4 LoRAs of a kind ask on 2 splits by 3 metrics, as they are and centred.
    found = {
        (row["feature"], row["basis"], row["calibration"], row["metric"], row["components"])
        for row in protocol
    }
    bases = [("none", "none", 0), ("mean", "none", 0)]
    expected = {
        (feature, basis, kind, metric, k)
        for feature in ("style", "theta")
        for basis, kind, k in bases
        for metric in ("cosine", "csls", "csls within")
    } | {
        (feature, "components", kind, metric, k)
        for feature in ("style", "theta")
        for kind in ("none", "scale and offset", "scale only", "without labels")
        for metric in ("cosine", "euclidean", "csls", "csls within")
        for k in (3, 6)
    }
    assert found == expected
    assert {row["groups"] for row in protocol} == {"all"}
    assert "40 LoRAs of 4 artists" in result.stderr

    written = call(folder, *SHORT, "--csv", "--header", "--quiet")
    assert written.exit_code == 0 and written.stderr == ""
    lines = list(csv.DictReader(io.StringIO(written.stdout)))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["metric"] == row["metric"] and line["split"] == row["split"]
        expected_map = "" if row["map"] is None else f"{row['map']:.4f}"
        assert line["map"] == expected_map


def test_the_columns_are_the_fields_of_a_row() -> None:
    assert [column.key for column in COLUMNS] == list(Row.__dataclass_fields__)


def long_table() -> list[Row]:
    """Two metrics, two numbers of components; cosine is better on validation."""
    rows = [
        Row("protocol", "theta", "all", "none", metric="cosine", split=split, map=50.0)
        for split in ("validation", "test", "test_same", "test_diff")
    ]
    for metric, k, chosen, score in (
        ("cosine", 10, True, 70.0),
        ("cosine", 20, False, 60.0),
        ("euclidean", 10, False, 30.0),
        ("euclidean", 20, True, 40.0),
    ):
        for split in ("train", "validation", "test", "test_same", "test_diff"):
            row = Row("protocol", "theta", "all", "components", "none", metric, k, chosen, split)
            figures = {"map": None if split == "train" else score}
            if chosen:
                figures |= {"ari": score, "ari_sd": 1.0, "nmi": score, "nmi_sd": 2.0}
            rows.append(Row(**{**row.__dict__, **figures}))
    for size in (2, 4):
        row = Row("drift", "theta", "all", "components", "none", "euclidean", 20, split="test_same")
        rows.append(
            Row(**{**row.__dict__, "per_artist": size, "spread": size / 10, "distance": 0.5})
        )
    return rows


def test_tables_show_the_choice_of_validation() -> None:
    retrieval, clusters, drift = tables(long_table(), "", full=False)
    assert [(r["basis"], r["metric"], r["components"]) for r in retrieval.rows] == [
        ("none", "cosine", None),
        ("PCA", "cosine", 10),
    ]
    assert retrieval.rows[1]["map test_same"] == 70.0
    assert [c.key for c in retrieval.columns][-3:] == [
        "map validation",
        "map test_same",
        "map test_diff",
    ]
    (row,) = clusters.rows
    assert (row["ari train"], row["nmi test"]) == ("70.0 ±1.0", "70.0 ±2.0")
    # Drift at the number of components of the metric usual for the feature.
    assert [(r["figure"], r["components"], r["at 2"], r["at 4"]) for r in drift.rows] == [
        ("spread", 20, 0.2, 0.4),
        ("distance", 20, 0.5, 0.5),
    ]
    asked, *_ = tables(long_table(), "euclidean", full=False)
    assert [r["components"] for r in asked.rows] == [None, 20]
    full, *_ = tables(long_table(), "", full=True)
    assert [(r["metric"], r["components"], r["chosen"]) for r in full.rows] == [
        ("cosine", None, True),
        ("cosine", 10, True),
        ("cosine", 20, False),
        ("euclidean", 10, False),
        ("euclidean", 20, True),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty module on Windows")
def test_a_terminal_gets_tables(folder: Path) -> None:
    from tests.terminal import run_on_terminal

    code = (
        "from lorafind.cli.app import run\n"
        "from tests.cli.test_eval import EvalGroup\n"
        "run(EvalGroup)\n"
    )
    root = Path(__file__).resolve().parents[2]
    exit_code, shown = run_on_terminal(
        [sys.executable, "-c", code, "-q", "eval", str(folder), *SHORT],
        root,
        {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        columns=120,
    )
    assert exit_code == 0, shown
    for heading in ("Retrieval, percent.", "Clusters: ", "Artists that the", "Drift of unseen"):
        assert heading in shown
    (calibrated,) = [
        line.split() for line in shown.splitlines() if line.startswith("style    all     calib")
    ][:1]
    assert calibrated[3] in ("cosine", "euclidean") and calibrated[4] in ("3", "6")


def test_plots(folder: Path, tmp_path: Path) -> None:
    result = call(folder, *SHORT, "--plots", tmp_path / "plots", "--verbose", "--json")
    assert result.exit_code == 0, result.stderr
    expected = {
        f"{f}-{p}.png"
        for f in ("style", "theta")
        for p in ("components", "scales", "places", "drift")
    }
    assert {p.name for p in (tmp_path / "plots").iterdir()} == expected
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5
        assert f"wrote {path}" in result.stderr


def test_plots_without_matplotlib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call(folder, *SHORT, "--plots", tmp_path / "plots")
    assert result.exit_code == 4
    assert "pip install 'lorafind[plot]'" in result.stderr and not result.stdout
    assert not (tmp_path / "plots").exists()


def test_pictures(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.ViTConfig(**shape, num_attention_heads=2, image_size=16, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "dino")
    rng = np.random.default_rng(0)
    for artist, place in enumerate(sorted(folder.iterdir())):
        for file in sorted(place.iterdir()):
            for kind, noise in (("original", 20), ("generated", 90)):
                pixels = 60 * artist + noise * rng.random((16, 16, 3))
                made = tmp_path / kind / file.stem
                made.mkdir(parents=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(made / "a.png")
    (tmp_path / "original" / "lora-0-00" / "b.png").write_bytes(b"no picture")
    result = call(
        folder,
        "--features",
        "style",
        "--components",
        "3",
        "--images-original",
        tmp_path / "original",
        "--images-generated",
        tmp_path / "generated",
        "--encoders",
        f"dino={tmp_path / 'dino'}",
        "--json",
    )
    # One picture could not be read.
    assert result.exit_code == 3, result.stderr
    assert "b.png" in result.stderr
    rows = [row for row in json.loads(result.stdout) if row["table"] == "images"]
    assert {row["scenario"] for row in rows if row["map"] is not None} == {
        f"{one} → {two}" for one in ("original", "generated") for two in ("original", "generated")
    }
    similar = [row for row in rows if row["similarity"] is not None]
    assert [(row["feature"], row["scenario"], row["components"]) for row in similar] == [
        ("style × dino", "original", 3),
        ("style × dino", "generated", 3),
    ]


def test_bad_files_are_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "loras"
    for artist in folder.iterdir():
        (place / artist.name).mkdir(parents=True)
        for file in artist.iterdir():
            (place / artist.name / file.name).hardlink_to(file)
    (place / "artist-1" / "bad\n.safetensors").write_bytes(b"nothing")
    result = call(place, *SHORT, "--json")
    assert result.exit_code == 3
    assert result.stderr.count("warning: ") == 1 and "bad\\n.safetensors" in result.stderr
    assert json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--features", "styel"), 2, "'styel' is no feature; choose from style"),
        (("--groups", "slef"), 2, "'slef' is no group"),
        (("--components", "3,none"), 2, "whole numbers"),
        (("--components", "0"), 2, "whole numbers"),
        (("--weights", "cross"), 2, "pairs like cross=0.7"),
        (("--weights", "cross=-1"), 2, "numbers from 0 on"),
        (("-0",), 2, "eval has no paths to write"),
        (("--metric", "csls"), 2, "cosine, euclidean"),
        (("--device", "tpu"), 2, "unknown device 'tpu'"),
        (("--images", "x", "--images-original", "y"), 2, "--images stands alone"),
        (("--labels", "none.csv"), 4, "none.csv cannot be read as CSV"),
    ],
)
def test_wrong_use(folder: Path, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    result = call(folder, *arguments)
    assert result.exit_code == code
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr and not result.stdout


def test_a_folder_without_labels(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 4 and "has no labelled LoRA" in result.stderr
