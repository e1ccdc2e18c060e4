"""Latents and embeddings: right, computed once, keyed by what they are a function of."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorafind.train import cache
from lorafind.train.cache import Example, Prepared, Stored, prepare
from lorafind.train.captions import gather
from lorafind.train.images import Picture
from lorafind.train.model import Base, load_base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from tests.train import tiny

SETTINGS = Settings(resolution=tiny.RESOLUTION, prior_weight=0.0, token="")


def pictures(*folders: Path, how: str = "files") -> list[Picture]:
    return gather(folders, how, resolution=tiny.RESOLUTION).pictures


def files(folder: Path, kind: str = "*") -> dict[str, int]:
    """Files of a cache and when they were made (a use moves only the time of change)."""
    return {p.name: p.stat().st_ino for p in folder.glob(f"train/{kind}/*")}


def by_name(examples: Sequence[Example]) -> dict[str, Example]:
    return {e.name: e for e in examples}


def assert_equal(one: Example, two: Example) -> None:
    for name in ("mean", "std", "prompt"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_what_is_stored_is_what_the_encoders_say(base: Base, rings: Path, tmp_path: Path) -> None:
    found = prepare(base, pictures(rings), SETTINGS, cache=tmp_path)
    assert len(found.instance) == 6 and not found.prior and not found.warnings
    for example in found.instance:
        # 96 × 80 pixels: the square in the middle.
        image = Image.open(rings / example.name).resize(
            (64, 64), Image.Resampling.LANCZOS, box=(8, 0, 88, 80)
        )
        pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)
        with torch.no_grad():
            posterior = base.vae.encode(pixels[None]).latent_dist
            text = (rings / example.name).with_suffix(".txt").read_text()
            ids = base.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
            said = base.text_encoder(ids)[0][0]
        scale = base.vae.config.scaling_factor
        torch.testing.assert_close(example.mean, posterior.mean[0] * scale)
        torch.testing.assert_close(example.std, posterior.std[0] * scale)
        torch.testing.assert_close(example.prompt, said)
        assert example.mean.shape == (4, 8, 8) and example.prompt.shape == (77, 64)
        assert {t.dtype for t in (example.mean, example.std, example.prompt)} == {torch.float32}


def test_what_is_cached_needs_no_encoder(
    base: Base, rings: Path, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = by_name(prepare(base, pictures(rings, stripes), SETTINGS, cache=tmp_path).instance)
    before = files(tmp_path)
    assert len(files(tmp_path, "latents")) == 12 and len(files(tmp_path, "prompts")) == 3
    # The same pictures elsewhere, under other names, in another order, with other captions.
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(sorted([*rings.glob("*.png"), *stripes.glob("*.png")])[::-1]):
        (moved / f"{number:02}.png").write_bytes(path.read_bytes())
        (moved / f"{number:02}.txt").write_bytes(path.with_suffix(".txt").read_bytes())
    monkeypatch.setattr(base.vae, "encode", None)
    monkeypatch.setattr(base.text_encoder, "forward", None)
    again = prepare(base, pictures(moved), SETTINGS, cache=tmp_path)
    assert files(tmp_path) == before
    names = sorted(first)[::-1]
    for number, name in enumerate(names):
        assert_equal(by_name(again.instance)[f"{number:02}.png"], first[name])


def test_a_cached_run_and_one_without_are_the_same(
    base: Base, rings: Path, stripes: Path, tmp_path: Path
) -> None:
    """What is stored of one picture does not hang on the others or on the order."""
    together = by_name(
        prepare(base, pictures(rings, stripes), SETTINGS, cache=tmp_path / "a").instance
    )
    alone = prepare(base, pictures(rings / "rings-4.png"), SETTINGS, cache=tmp_path / "b")
    assert_equal(alone.instance[0], together["rings-4.png"])


def test_every_fact_counts(base: Base, rings: Path, tmp_path: Path) -> None:
    chosen = pictures(rings)[:2]

    def new(base: Base = base, pictures: Sequence[Picture] = chosen, **changes: Any) -> Prepared:
        return prepare(base, pictures, replace(SETTINGS, **changes), cache=tmp_path)

    def made() -> tuple[int, int]:
        found = len(files(tmp_path, "latents")), len(files(tmp_path, "prompts"))
        for file in tmp_path.glob("train/*/*"):
            file.unlink()
        new()
        return found[0] - 2, found[1] - 2

    digests = [new().digest]
    assert made() == (0, 0)
    digests.append(new(token="sks").digest)
    assert made() == (0, 2)
    digests.append(new(resolution=128).digest)
    assert made() == (2, 0)
    other = [replace(chosen[0], caption="other"), chosen[1]]
    digests.append(new(pictures=other).digest)
    assert made() == (0, 1)
    digests.append(new(pictures=chosen[::-1]).digest)
    assert made() == (0, 0)
    digests.append(new(pictures=chosen[:1]).digest)
    assert made() == (0, 0)
    with torch.no_grad():
        base.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    digests.append(new().digest)
    assert made() == (2, 0)
    with torch.no_grad():
        base.text_encoder.get_input_embeddings().weight[0, 0] += 1
    digests.append(new().digest)
    assert made() == (0, 2)
    assert len(set(digests)) == len(digests)
    # The last bits hang on the number of threads; what is trained on stays the same.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert new().digest == digests[-1]
    finally:
        torch.set_num_threads(threads)
    assert made() == (2, 2)


def test_damage_is_mended(base: Base, rings: Path, tmp_path: Path) -> None:
    chosen = pictures(rings)[:4]
    first = prepare(base, chosen, SETTINGS, cache=tmp_path)
    kept = [first.instance[i] for i in range(4)]
    latents = sorted(tmp_path.glob("train/latents/*"))
    latents[0].write_bytes(latents[0].read_bytes()[:-10])
    latents[1].write_bytes(b"")
    whole = load_file(latents[2])
    save_file({"mean": whole["mean"], "std": whole["std"] * torch.nan}, latents[2])
    save_file({"mean": whole["mean"]}, latents[3])
    again = prepare(base, chosen, SETTINGS, cache=tmp_path)
    for i in range(4):
        assert_equal(again.instance[i], kept[i])
    # What goes while it is in use is told.
    latents[0].unlink()
    latents[1].unlink()
    fresh = Stored(again.instance._rows)  # type: ignore[attr-defined]
    with pytest.raises(TrainProblem, match=r"What was cached of rings-\d\.png is gone from"):
        [fresh[i] for i in range(4)]


def test_the_word_before_every_caption(base: Base, rings: Path, tmp_path: Path) -> None:
    chosen = pictures(rings)[:2]
    drawn = prepare(base, chosen, replace(SETTINGS, token=None, seed=1), cache=tmp_path)
    assert drawn.token in tiny.RARE
    assert list(drawn.prompts) == [f"{drawn.token} a red picture", f"{drawn.token} a green picture"]
    again = prepare(base, chosen, replace(SETTINGS, token=None, seed=1), cache=tmp_path)
    assert again.token == drawn.token and again.digest == drawn.digest
    # A word that a caption has already is not drawn.
    taken = [replace(p, caption=f"A painting, by {drawn.token.upper()}!") for p in chosen]
    other = prepare(base, taken, replace(SETTINGS, token=None, seed=1), cache=tmp_path)
    assert other.token != drawn.token
    none = [replace(p, caption="") for p in chosen]
    bare = prepare(base, none, replace(SETTINGS, token="bdw"), cache=tmp_path)
    assert list(bare.prompts) == ["bdw", "bdw"]
    assert torch.equal(bare.instance[0].prompt, bare.instance[1].prompt)


def test_long_captions_are_cut_with_a_warning(base: Base, rings: Path, tmp_path: Path) -> None:
    one, two = pictures(rings)[:2]
    long = replace(one, caption="the " * 80), replace(two, caption="the " * 75)
    found = prepare(base, long, SETTINGS, cache=tmp_path)
    assert len(found.warnings) == 1
    assert "1 of 2 prompts have more than 75 tokens" in found.warnings[0]
    assert torch.equal(found.instance[0].prompt, found.instance[1].prompt)


def test_class_images_are_part_of_it(
    base: Base, rings: Path, stripes: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, prior_weight=0.5, class_images=stripes, prior_prompt="a picture")
    found = prepare(base, pictures(rings), settings, cache=tmp_path)
    plain = prepare(base, pictures(rings), SETTINGS, cache=tmp_path)
    assert len(found.prior) == 6 and {e.name[:7] for e in found.prior} == {"stripes"}
    ids = base.tokenizer("a picture", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        said = base.text_encoder(ids)[0][0]
    assert all(torch.equal(e.prompt, said) for e in found.prior)
    assert found.digest != plain.digest


def test_pictures_that_change_meanwhile(base: Base, rings: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes((rings / "rings-0.png").read_bytes())
    seen = pictures(path, how="none")
    path.write_bytes((rings / "rings-1.png").read_bytes())
    with pytest.raises(TrainProblem, match=r"one\.png has changed since"):
        prepare(base, seen, SETTINGS, cache=tmp_path / "cache")
    path.unlink()
    with pytest.raises(TrainProblem, match=r"one\.png cannot be read any more"):
        prepare(base, seen, SETTINGS, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/train/latents/*"))


def test_a_vae_that_gives_no_numbers(base: Base, rings: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        base.vae.quant_conv.bias[0] = torch.nan
    with pytest.raises(TrainProblem, match=r"gives no numbers for .*rings-0\.png"):
        prepare(base, pictures(rings), SETTINGS, cache=tmp_path)


def test_dropped_encoders(base: Base, rings: Path, tmp_path: Path) -> None:
    found = prepare(base, pictures(rings), SETTINGS, cache=tmp_path)
    base.drop_encoders()
    assert found.instance[0].mean.shape == (4, 8, 8)
    with pytest.raises(ValueError, match="dropped already"):
        prepare(base, pictures(rings), SETTINGS, cache=tmp_path)


def test_only_a_few_examples_are_held(
    base: Base, rings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare(base, pictures(rings), SETTINGS, cache=tmp_path).instance
    assert found[-1].name == "rings-5.png" and [e.name for e in found[1:3]] == [
        *("rings-1.png", "rings-2.png")
    ]
    assert found[0] is found[0]
    with pytest.raises(IndexError):
        found[6]
    monkeypatch.setattr(cache, "_HELD", 2)
    many = Stored(found._rows * 1000)  # type: ignore[attr-defined]
    assert len(many) == 6000
    first = weakref.ref(many[0].mean)
    assert first() is not None
    many[1], many[2]
    assert first() is None


def test_what_nobody_uses_is_forgotten(base: Base, rings: Path, tmp_path: Path) -> None:
    chosen = pictures(rings)
    prepare(base, chosen, SETTINGS, cache=tmp_path)
    image = tmp_path / "train" / "class" / "key" / "00000.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    long_ago = time.time() - 40 * 86400
    for file in (*tmp_path.glob("train/*/*"), image):
        os.utime(file, (long_ago, long_ago))
    before = files(tmp_path, "latents")
    cache.forget(tmp_path / "train", days=50)
    assert files(tmp_path, "latents") == before
    # Half of them are asked for again: they stay as they are.
    prepare(base, chosen[:3], SETTINGS, cache=tmp_path)
    after = files(tmp_path, "latents")
    assert len(after) == 3 and after.items() <= before.items()
    assert image.exists()


def test_two_at_once(tiny_folder: Path, rings: Path, tmp_path: Path) -> None:
    begin = Barrier(2)
    bases = [load_base(str(tiny_folder)) for _ in range(2)]
    settings = replace(SETTINGS, prior_weight=1.0, class_count=1)

    def run(base: Base) -> Prepared:
        begin.wait()
        return prepare(base, pictures(rings), settings, cache=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, bases)
    assert one.digest == two.digest
    for ours, theirs in zip([*one.instance, *one.prior], [*two.instance, *two.prior], strict=True):
        assert_equal(ours, theirs)
    assert len(files(tmp_path, "latents")) == 7 and len(files(tmp_path, "prompts")) == 4
    assert not list(tmp_path.rglob("*.part"))


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFIND_CACHE", str(tmp_path))
    assert cache.root() == tmp_path
    monkeypatch.delenv("LORAFIND_CACHE")
    assert cache.root().name == "lorafind"


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(tmp_path / "a" / "b", b"content")
    assert list((tmp_path / "a").iterdir()) == []
