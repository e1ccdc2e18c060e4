"""Captions: where they come from, and what is said when there are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lorafind.train.blip import Blip
from lorafind.train.captions import gather, write_beside
from lorafind.train.images import Picture
from lorafind.train.problem import TrainProblem
from tests.train import tiny


def captions(pictures: Sequence[Picture]) -> dict[str, str]:
    return {p.path.name: p.caption for p in pictures}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures without captions."""
    return tiny.paint(tmp_path / "pictures", "rings", range(3), captions=False)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of two narrow layers with random weights, as transformers saves it."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.WORDS.split()]
    place: Path = tmp_path_factory.mktemp("blip") / "model"
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={
            **narrow,
            "vocab_size": len(words),
            "num_attention_heads": 2,
            "encoder_hidden_size": 32,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={
            **narrow,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(place)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(place)
    return place


def test_captions_lie_beside_the_pictures(folder: Path) -> None:
    (folder / "rings-0.txt").write_text("\ufeffa red picture,\n  with rings \n", "utf-8")
    (folder / "rings-0.caption").write_text("not this one")
    (folder / "rings-1.txt").write_text(" \n")
    (folder / "rings-1.caption").write_text("été", "utf-8")
    rows = [
        {"file_name": "rings-0.png", "text": "nor this"},
        {"file_name": "rings-2.png", "text": "a\u2028b"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (folder / "metadata.jsonl").write_text(text, "utf-8")
    found = gather([folder], resolution=64)
    assert captions(found.pictures) == {
        "rings-0.png": "a red picture, with rings",
        "rings-1.png": "été",
        "rings-2.png": "a b",
    }
    assert {p.origin for p in found.pictures} == {"file"}
    single = gather([folder / "rings-2.png"], resolution=64)
    assert captions(single.pictures) == {"rings-2.png": "a b"}


def test_a_table_in_the_folder_above(folder: Path) -> None:
    rows = [{"file_name": f"{folder.name}/rings-{i}.png", "caption": f"no. {i}"} for i in range(3)]
    table = folder.parent / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert list(captions(gather([folder], resolution=64).pictures).values()) == [
        *("no. 0", "no. 1", "no. 2")
    ]


def test_nothing_is_trained_silently_without_captions(folder: Path) -> None:
    with pytest.raises(TrainProblem, match=r"None of the 3 .*--caption blip.*--caption none"):
        gather([folder], resolution=64)
    (folder / "rings-1.txt").write_text("one")
    with pytest.raises(TrainProblem) as refused:
        gather([folder], resolution=64)
    said = str(refused.value)
    assert said.startswith("2 of 3 pictures have no caption: ")
    assert "rings-0.png" in said and "rings-2.png" in said and "rings-1.png" not in said
    found = gather([folder], "none", resolution=64)
    assert {p.caption for p in found.pictures} == {""}


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"x")
    (folder / "worse.jpg").write_bytes(b"")
    (folder / "rings-1.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "metadata.jsonl").write_text('{"file_name": "rings-2.png", "text": "two"}\n{"text"')
    for _ in range(2):
        with pytest.raises(TrainProblem) as refused:
            gather([folder], resolution=64)
        said = str(refused.value)
        assert "2 of 5 pictures cannot be read" in said and "--skip-unreadable" in said
        for part in ("broken.png (", "worse.jpg (", "rings-1.txt (it is not UTF-8)", "line 2"):
            assert part in said
        assert "1 of 5 pictures have no caption" in said and "rings-0.png" in said
    (folder / "metadata.jsonl").unlink()
    for i in range(3):
        (folder / f"rings-{i}.txt").write_text(f"no. {i}")
    found = gather([folder], resolution=64, skip_unreadable=True)
    assert len(found.pictures) == 3
    assert [path.name for path, _ in found.skipped] == ["broken.png", "worse.jpg"]
    with pytest.raises(TrainProblem, match="None of the 1 pictures can be read"):
        gather([folder / "broken.png"], "none", resolution=64, skip_unreadable=True)
    with pytest.raises(TrainProblem, match="files, blip, none"):
        gather([folder], "llava", resolution=64)


def test_blip_describes_what_has_no_caption(folder: Path, blip: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    (folder / "rings-1.txt").write_text("by hand")
    captioner = Blip(str(blip), cache=tmp_path)
    found = gather([folder], "blip", resolution=64, captioner=captioner)
    assert [p.origin for p in found.pictures] == ["blip", "file", "blip"]
    assert found.pictures[1].caption == "by hand"

    # The same with transformers alone.
    from PIL import Image

    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    words = AutoTokenizer.from_pretrained(blip)
    images = AutoImageProcessor.from_pretrained(blip, backend="pil")
    for picture in (found.pictures[0], found.pictures[2]):
        given = images(Image.open(picture.path), return_tensors="pt")
        out = model.generate(**given, num_beams=3, min_length=5, max_length=30)
        assert picture.caption == words.decode(out[0], skip_special_tokens=True)
        assert set(picture.caption.split()) <= set(words.get_vocab())

    assert not list(folder.glob("rings-[02].txt"))
    assert [p.name for p in write_beside(found.pictures)] == ["rings-0.txt", "rings-2.txt"]
    assert (folder / "rings-1.txt").read_text() == "by hand"
    assert write_beside(found.pictures) == []
    again = gather([folder], resolution=64)
    assert captions(again.pictures) == captions(found.pictures)


def test_blip_describes_a_picture_once(
    folder: Path, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BlipForConditionalGeneration

    first = gather([folder], "blip", captioner=Blip(str(blip), cache=tmp_path)).pictures
    for number, path in enumerate(sorted(folder.glob("*.png"), reverse=True)):
        path.rename(folder / f"renamed-{number}.png")
    monkeypatch.setattr(BlipForConditionalGeneration, "generate", None)
    again = gather([folder], "blip", captioner=Blip(str(blip), cache=tmp_path)).pictures
    assert {p.digest: p.caption for p in again} == {p.digest: p.caption for p in first}


def test_a_blip_that_cannot_be_had(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainProblem, match=r"some/blip is no folder here.*offline.*--blip"):
        gather([folder], "blip", captioner=Blip("some/blip", offline=True))
    with pytest.raises(TrainProblem, match=r"holds no BLIP"):
        gather([folder], "blip", captioner=Blip(str(tmp_path)))
    with pytest.raises(TrainProblem, match=r"cannot be read as BLIP"):
        gather([folder], "blip", captioner=Blip(str(tiny_folder / "text_encoder")))
