"""Image features against transformers called directly, scikit-learn, and definitions by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.metrics.pairwise import cosine_similarity

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.encoders import Plain, open_encoder
from lorafind.evaluation.images import (
    BATCH,
    image_features,
)
from lorafind.index.progress import Silent

SIDE = 32
#: Shapes of the tiny towers.
TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "initializer_range": 0.2,
}
FILES = {
    "ada-01": ["a.png", "b.jpg", "c.webp"],
    "ada-02": ["only.png"],
    "bob-01": ["x.png", "y.png"],
}


class Recorder(Silent):
    """What a run tells."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stages: list[tuple[int, int]] = []
        self.done = 0
        self.stop_after = stop_after

    def stage(self, title: str, files: int, size: int) -> None:
        self.stages.append((files, size))

    def advance(self, files: int, size: int) -> None:
        self.done += files
        if self.stop_after is not None and self.done >= self.stop_after:
            raise KeyboardInterrupt


def picture(seed: int, width: int = 45, height: int = 38, mode: str = "RGB") -> Image.Image:
    """Coloured blocks, so that JPEG and resizing leave something."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).convert(mode)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip, dino and dinov2 as transformers saves them, with their preprocessor configs."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    # The tower's own projection_dim stays at its default of 512: the whole model's counts.
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=16)).save_pretrained(
        root / "clip"
    )
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(
        root / "clip"
    )
    ViTModel(ViTConfig(**TOWER)).save_pretrained(root / "dino")
    ViTImageProcessor(size=square).save_pretrained(root / "dino")
    tower = {name: value for name, value in TOWER.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**tower)).save_pretrained(root / "dinov2")
    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=square).save_pretrained(
        root / "dinov2"
    )
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three LoRAs: two beside each other, one below its artist."""
    root = tmp_path / "images"
    for i, (name, files) in enumerate(FILES.items()):
        place = root / "bob" / name if name.startswith("bob") else root / name
        place.mkdir(parents=True)
        for j, file in enumerate(files):
            picture(10 * i + j, 45 + 7 * j).save(place / file)
        (place / "caption.txt").write_text("a picture")
        (place / "._a.png").write_bytes(b"what macOS leaves")
    return root


def opened(folder: Path, name: str) -> list[Image.Image]:
    place = folder / "bob" / name if name.startswith("bob") else folder / name
    return [Image.open(place / file).convert("RGB") for file in FILES[name]]


def by_transformers(models: Path, kind: str) -> Callable[[list[Image.Image]], np.ndarray]:
    """The features that transformers gives for a list of images, n × D."""
    from transformers import AutoImageProcessor, CLIPModel, Dinov2Model, ViTModel

    processor = AutoImageProcessor.from_pretrained(models / kind)
    model: Any = {"clip": CLIPModel, "dino": ViTModel, "dinov2": Dinov2Model}[kind]
    model = model.from_pretrained(models / kind).eval()

    def features(given: list[Image.Image]) -> np.ndarray:
        pixels = processor(images=given, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "clip":
                out = model.visual_projection(model.vision_model(pixels).pooler_output)
            elif kind == "dino":
                out = model(pixels).last_hidden_state[:, 0]
            else:
                out = model(pixels).pooler_output
        return np.asarray(out)

    return features


@pytest.mark.parametrize(("kind", "width"), [("clip", 16), ("dino", 128), ("dinov2", 128)])
def test_the_mean_of_what_transformers_gives(
    models: Path, folder: Path, kind: str, width: int
) -> None:
    got = image_features(f"{kind}={models / kind}", folder, [*FILES, "nobody-01"])
    assert list(got.rows) == list(FILES)
    assert got.missing == ["nobody-01"] and got.unreadable == []
    reference = by_transformers(models, kind)
    for name in FILES:
        expected = reference(opened(folder, name))
        assert got.rows[name].shape == (width,) and got.rows[name].dtype == np.float32
        np.testing.assert_allclose(got.rows[name], expected.mean(0), rtol=1e-4, atol=1e-5)
    # The encoders are no constant: else nothing above would mean much.
    assert cosine_similarity(got.matrix(list(FILES))).min() < 0.99


def test_many_images_go_in_batches(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "i" / "many"
    place.mkdir(parents=True)
    for i in range(BATCH + 3):
        picture(i, 20 + i).save(place / f"{i:03}.png")
    watch = Recorder()
    got = image_features(f"dino={models / 'dino'}", place.parent, ["many"], watch=watch)
    expected = by_transformers(models, "dino")([picture(i, 20 + i) for i in range(BATCH + 3)])
    np.testing.assert_allclose(got.rows["many"], expected.mean(0), rtol=1e-4, atol=1e-5)
    size = sum(p.stat().st_size for p in place.iterdir())
    assert watch.stages == [(BATCH + 3, size)] and watch.done == BATCH + 3


# --- Preparation


def test_plain_preparation_is_clips_own() -> None:
    from transformers import CLIPImageProcessor

    square = {"height": SIDE, "width": SIDE}
    reference = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=square)
    plain = Plain(40, SIDE, tuple(reference.image_mean), tuple(reference.image_std))
    for width, height in ((60, 44), (44, 77), (30, 20)):
        given = picture(3, width, height)
        expected = reference(images=given, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(plain(given), expected, atol=1e-5)


def test_the_crop_rounds_as_torchvision_does() -> None:
    # 35 wide: half of the 3 columns too many is 1.5, which torchvision rounds to 2 (and
    # transformers cuts to 1).
    given = picture(4, 35, 32)
    got = Plain(32, 32, (0, 0, 0), (1, 1, 1))(given)
    expected = np.asarray(given, np.float32)[:, 2:34].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_without_a_preprocessor_config_the_authors_evaluation(
    models: Path, folder: Path, tmp_path: Path
) -> None:
    from transformers import ViTModel

    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((models / "dino" / file).read_bytes())
    got = image_features(f"dino={bare}", folder, ["ada-02"])
    # Shorter side to 256/224 of the crop, ImageNet's mean and deviation.
    plain = Plain(round(SIDE * 256 / 224), SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.from_numpy(plain(opened(folder, "ada-02")[0]))[None]
    with torch.no_grad():
        expected = ViTModel.from_pretrained(bare).eval()(pixels).last_hidden_state[0, 0]
    np.testing.assert_allclose(got.rows["ada-02"], expected, rtol=1e-4, atol=1e-5)


def test_pictures_are_seen_upright_and_in_rgb(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    for name in ("turned", "straight", "grey", "palette", "two-frames"):
        (place / name).mkdir(parents=True)
    given = picture(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    given.rotate(90, expand=True).save(place / "turned" / "a.png", exif=exif)
    given.save(place / "straight" / "a.png")
    given.convert("L").save(place / "grey" / "a.png")
    given.quantize(30).save(place / "palette" / "a.png")
    frames = [given, picture(6)]
    frames[0].save(place / "two-frames" / "a.webp", save_all=True, append_images=frames[1:])
    names = sorted(p.name for p in place.iterdir())
    got = image_features(f"clip={models / 'clip'}", place, names)
    assert got.unreadable == []
    np.testing.assert_allclose(got.rows["turned"], got.rows["straight"], atol=1e-5)
    reference = by_transformers(models, "clip")
    grey = reference([ImageOps.grayscale(given).convert("RGB")])[0]
    np.testing.assert_allclose(got.rows["grey"], grey, atol=1e-4)


# --- Folders


def test_what_cannot_be_read_is_named_and_left_out(models: Path, folder: Path) -> None:
    whole = (folder / "ada-01" / "b.jpg").read_bytes()
    (folder / "ada-01" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "ada-01" / "text.png").write_text("<html>404</html>")
    picture(1, 900, 8).save(folder / "ada-01" / "line.png")
    (folder / "ada-02" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "all-bad").mkdir()
    (folder / "all-bad" / "empty.png").touch()
    (folder / "empty").mkdir()
    encoder = open_encoder(f"clip={models / 'clip'}")
    got = image_features(encoder, folder, [*FILES, "all-bad", "empty"])
    assert got.missing == ["all-bad", "empty"]
    reasons = {path.name: why for path, why in got.unreadable}
    assert set(reasons) == {"broken.jpg", "text.png", "line.png", "gone.png", "empty.png"}
    assert "truncated" in reasons["broken.jpg"]
    assert reasons["text.png"] == reasons["empty.png"] == "no image that Pillow knows"
    assert "900 × 8" in reasons["line.png"] and "No such file" in reasons["gone.png"]
    expected = by_transformers(models, "clip")(opened(folder, "ada-01")).mean(0)
    np.testing.assert_allclose(got.rows["ada-01"], expected, rtol=1e-4, atol=1e-5)


def test_a_name_that_may_mean_two_folders_is_refused(models: Path, tmp_path: Path) -> None:
    for artist in ("ada", "bob"):
        for name in ("first", artist):
            (tmp_path / artist / name).mkdir(parents=True)
            picture(len(artist + name)).save(tmp_path / artist / name / "a.png")
    encoder = open_encoder(f"clip={models / 'clip'}")
    with pytest.raises(BasisProblem, match=r"images of first may be .*ada.*bob"):
        image_features(encoder, tmp_path, ["first"])
    assert list(image_features(encoder, tmp_path, ["ada/first", "bob/first"]).rows) == [
        "ada/first",
        "bob/first",
    ]
    # An artist's folder that bears the name of its LoRA.
    assert list(image_features(encoder, tmp_path, ["ada"]).rows) == ["ada"]
    with pytest.raises(BasisProblem, match="nowhere is no folder"):
        image_features(encoder, tmp_path / "nowhere", ["ada"])


# --- The cache


def test_a_second_run_computes_nothing(models: Path, folder: Path, tmp_path: Path) -> None:
    spec, cache = f"clip={models / 'clip'}", tmp_path / "made" / "cache"
    first, second = Recorder(), Recorder()
    got = image_features(spec, folder, list(FILES), cache=cache, watch=first)
    again = image_features(spec, folder, list(FILES), cache=cache, watch=second)
    assert first.done == 6 and second.stages == []
    np.testing.assert_array_equal(again.matrix(list(FILES)), got.matrix(list(FILES)))
    # What is on the disk is what is used.
    (file,) = cache.iterdir()
    held = dict(np.load(file))
    assert held["features"].shape == (6, 16) and held["features"].dtype == np.float32
    np.savez(file, **held | {"features": held["features"] * 2})
    doubled = image_features(spec, folder, list(FILES), cache=cache)
    np.testing.assert_allclose(doubled.rows["bob-01"], 2 * got.rows["bob-01"])


def test_what_changed_is_computed_again(models: Path, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    spec = f"clip={models / 'clip'}"
    image_features(spec, folder, ["ada-01"], cache=cache)
    picture(77).save(folder / "ada-01" / "a.png")
    (folder / "ada-01" / "b.jpg").unlink()
    watch = Recorder()
    got = image_features(spec, folder, ["ada-01", "ada-02"], cache=cache, watch=watch)
    assert watch.done == 2  # the changed one, and that of the LoRA that was not asked for
    fresh = image_features(spec, folder, ["ada-01", "ada-02"])
    np.testing.assert_allclose(got.rows["ada-01"], fresh.rows["ada-01"], atol=1e-5)
    (file,) = cache.iterdir()
    # Of the changed image the new features alone; nothing is known of why b.jpg went.
    names = [Path(path).name for path in np.load(file)["paths"]]
    assert sorted(names) == ["a.png", "b.jpg", "c.webp", "only.png"]
    # Same size, other time.
    os.utime(folder / "ada-02" / "only.png", ns=(1, 1))
    watch = Recorder()
    image_features(spec, folder, ["ada-01", "ada-02"], cache=cache, watch=watch)
    assert watch.done == 1


def test_another_model_has_its_own_cache(models: Path, folder: Path, tmp_path: Path) -> None:
    cache, place = tmp_path / "cache", tmp_path / "model"
    place.mkdir()
    for file in (models / "clip").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    image_features(f"clip={place}", folder, ["ada-02"], cache=cache)
    os.utime(place / "model.safetensors", ns=(5, 5))
    watch = Recorder()
    image_features(f"clip={place}", folder, ["ada-02"], cache=cache, watch=watch)
    assert watch.done == 1 and len(list(cache.iterdir())) == 2


def test_an_interrupted_run_keeps_what_it_has(models: Path, tmp_path: Path) -> None:
    place, cache = tmp_path / "i" / "many", tmp_path / "cache"
    place.mkdir(parents=True)
    for i in range(BATCH + 2):
        picture(i).save(place / f"{i:03}.png")
    spec = f"clip={models / 'clip'}"
    with pytest.raises(KeyboardInterrupt):
        image_features(spec, place.parent, ["many"], cache=cache, watch=Recorder(stop_after=1))
    watch = Recorder()
    got = image_features(spec, place.parent, ["many"], cache=cache, watch=watch)
    assert watch.done == 2
    whole = image_features(spec, place.parent, ["many"])
    np.testing.assert_allclose(got.rows["many"], whole.rows["many"], atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "text", "array missing"])
def test_a_damaged_cache_is_named_and_made_again(
    models: Path, folder: Path, tmp_path: Path, damage: str
) -> None:
    spec = f"clip={models / 'clip'}"
    expected = image_features(spec, folder, ["bob-01"], cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    if damage == "array missing":
        np.savez(file, paths=np.array(["x"]))
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "cut" else b"nothing")
    got = image_features(spec, folder, ["bob-01"], cache=tmp_path / "cache")
    ((path, why),) = got.unreadable
    assert path == file and why.startswith("damaged, computed again")
    np.testing.assert_allclose(got.rows["bob-01"], expected.rows["bob-01"], atol=1e-6)
    assert image_features(spec, folder, ["bob-01"], cache=tmp_path / "cache").unreadable == []
