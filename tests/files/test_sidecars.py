"""What stands beside a file: read with tolerance, never fatal."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from lorafind.files.sidecars import (
    MAX_SIDECAR,
    MAX_WORD,
    MAX_WORDS,
    Facts,
    Sidecar,
    adapter_config,
    display_name,
    facts_from_metadata,
    hints,
    read_sidecars,
)

SHA = "AB" * 32


def put(folder: Path, name: str, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, "utf-8")


def test_none(tmp_path: Path) -> None:
    assert read_sidecars(tmp_path / "x.safetensors") == Sidecar()


def test_webui(tmp_path: Path) -> None:
    put(
        tmp_path,
        "x.json",
        {
            "description": "text",
            "sd version": "SDXL",
            "activation text": "krk, style of krk",
            "preferred weight": 0.8,
            "notes": "",
        },
    )
    found = read_sidecars(tmp_path / "x.safetensors")
    assert found.base_model == "SDXL"
    assert found.trigger_words == ("krk", "style of krk")
    assert (found.weight, found.notes, found.files) == (0.8, "text", ("x.json",))


def test_civitai(tmp_path: Path) -> None:
    put(
        tmp_path,
        "x.civitai.info",
        {
            "name": "v2",
            "baseModel": "Pony",
            "trainedWords": ["a", "b, c"],
            "model": {"name": "Kiriko", "tags": ["game"]},
            "files": [
                {"primary": False, "hashes": {"SHA256": "00" * 32}},
                {"primary": True, "hashes": {"SHA256": SHA}},
            ],
        },
    )
    found = read_sidecars(tmp_path / "x.safetensors")
    assert (found.name, found.base_model) == ("Kiriko v2", "Pony")
    assert found.trigger_words == ("a", "b, c")
    assert found.tags == ("game",)
    assert found.sha256 == SHA.lower()


def test_lora_manager_and_stability_matrix(tmp_path: Path) -> None:
    put(
        tmp_path,
        "x.metadata.json",
        {
            "model_name": "Kiriko",
            "base_model": "SD 1.5",
            "sha256": SHA.lower(),
            "civitai": {"trainedWords": ["krk"]},
            "tags": ["t"],
        },
    )
    put(
        tmp_path,
        "y.cm-info.json",
        {
            "ModelName": "Kiriko",
            "VersionName": "v1",
            "BaseModel": "SD 1.5",
            "TrainedWords": ["krk"],
            "Hashes": {"SHA256": SHA},
        },
    )
    x, y = (read_sidecars(tmp_path / f"{n}.safetensors") for n in "xy")
    assert (x.name, y.name) == ("Kiriko", "Kiriko v1")
    for found in (x, y):
        assert found.base_model == "SD 1.5"
        assert found.trigger_words == ("krk",)
        assert found.sha256 == SHA.lower()


def test_the_users_words_win_and_previews_are_found(tmp_path: Path) -> None:
    put(tmp_path, "x.json", {"activation text": "mine"})
    put(tmp_path, "x.civitai.info", {"name": "v1", "trainedWords": ["theirs"]})
    put(tmp_path, "x.txt", "a note")
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "x.preview.webp").write_bytes(b"")
    found = read_sidecars(tmp_path / "x.safetensors")
    assert found.trigger_words == ("mine",)
    assert (found.name, found.notes) == ("v1", "a note")
    assert found.preview == "x.preview.webp"
    assert found.files == ("x.json", "x.civitai.info", "x.txt")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "7",
        '{"model": 3, "files": 4, "trainedWords": {"a": 1}}',
        '{"files": [3, {"hashes": "x"}], "name": [], "model": {"name": 7}}',
        '{"preferred weight": "x", "activation text": 5}',
        "[" * 100000,
    ],
)
@pytest.mark.parametrize("suffix", ["json", "metadata.json", "civitai.info", "cm-info.json"])
def test_broken_ones_are_recorded_and_never_fatal(
    tmp_path: Path, content: str, suffix: str
) -> None:
    put(tmp_path, f"x.{suffix}", content)
    found = read_sidecars(tmp_path / "x.safetensors")
    name = f"x.{suffix}"
    assert (found.files == (name,)) != (bool(found.broken) and found.broken[0][0] == name)
    assert found.trigger_words == ()


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"notes": "\xff"}')
    assert read_sidecars(tmp_path / "x.safetensors").broken == (("x.json", "it is not UTF-8"),)


def test_adapter_config_stands_only_for_adapter_model(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json", {"r": 4})
    assert adapter_config(tmp_path / "adapter_model.safetensors") == {"r": 4}
    assert adapter_config(tmp_path / "other.safetensors") is None
    put(tmp_path, "adapter_config.json", "{")
    assert adapter_config(tmp_path / "adapter_model.safetensors") is None


def test_facts_of_a_real_header(shared: Path) -> None:
    from lorafind.files.safetensors import read_header

    header = read_header(shared / "loras/real/sd1_lycoris-lokr_smart_falcon_4.safetensors")
    facts = facts_from_metadata(header.metadata)
    assert facts.output_name == "smart_falcon_lokr_3.0e-4"
    assert (facts.dim, facts.alpha, facts.seed) == ("4", "4.0", "42")
    assert facts.network_module == "lycoris.kohya"
    assert facts.base_model_name == "animefull-final-pruned.safetensors"
    assert facts.session_id and facts.epoch and facts.started_at
    assert facts.started_at < (facts.finished_at or 0)
    assert "sshs_model_hash" in facts.claimed_hashes
    assert facts.tags and facts.tags[0][1] >= facts.tags[-1][1]


def test_facts() -> None:
    facts = facts_from_metadata(
        {
            "modelspec.title": "Kiriko",
            "ss_output_name": "None",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_dataset_dirs": json.dumps({"10_krk woman": {"n_repeats": 10}}),
            "ss_datasets": json.dumps([{"subsets": [{"class_tokens": "other"}]}]),
            "ss_tag_frequency": json.dumps({"a": {"x": 2, "y": 5}, "b": {"x": 4}}),
            "ss_steps": "1200",
            "ss_training_started_at": "1680000000.5",
        }
    )
    assert (facts.title, facts.output_name) == ("Kiriko", None)
    assert facts.trigger_words == ("krk woman", "other")
    assert facts.tags == (("x", 6), ("y", 5))
    assert (facts.steps, facts.started_at) == (1200, 1680000000.5)


def test_broken_facts_are_none() -> None:
    broken = {
        "ss_tag_frequency": "{",
        "ss_dataset_dirs": "[3]",
        "ss_datasets": '{"a": 1}',
        "ss_steps": "many",
        "ss_training_started_at": "nan?",
        "ss_epoch": "9" * 5000,
    }
    assert facts_from_metadata(broken) == Facts()


def test_names() -> None:
    facts = Facts(title="title", output_name="output")
    assert display_name("/d/stem.safetensors", Sidecar(name="side"), facts) == "side"
    assert display_name("/d/stem.safetensors", Sidecar(), facts) == "title"
    assert display_name("/d/stem.safetensors", Sidecar(), Facts()) == "stem"
    assert display_name("/d/adapter_model.safetensors", Sidecar(), Facts()) == "d"
    assert display_name("/d/pytorch_lora_weights.bin", Sidecar(), Facts()) == "d"


@pytest.mark.parametrize(
    ("metadata", "architecture"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({"ss_v2": "True"}, "sd2"),
    ],
)
def test_hints(metadata: dict[str, str], architecture: str) -> None:
    assert hints(metadata) == {"architecture": architecture}
    assert hints({}) == {}


# ---------------------------------------------------------------------------- hostile ones


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs and devices in folders")
def test_a_sidecar_that_is_no_file_does_not_block(tmp_path: Path) -> None:
    for stem in ("x", "adapter_model"):
        os.mkfifo(tmp_path / f"{stem}.json")
        (tmp_path / f"{stem}.txt").symlink_to("/dev/zero")
        (tmp_path / f"{stem}.metadata.json").mkdir()
    os.mkfifo(tmp_path / "adapter_config.json")
    found: list[object] = []

    def look() -> None:
        path = tmp_path / "adapter_model.safetensors"
        found.append(adapter_config(path))
        found.append({name for name, _ in read_sidecars(path).broken})
        found.append({name for name, _ in read_sidecars(tmp_path / "x.safetensors").broken})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(10)
    endings = ("json", "txt", "metadata.json")
    assert found == [
        None,
        {f"adapter_model.{e}" for e in endings} | {"adapter_config.json"},
        {f"x.{e}" for e in endings},
    ]


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json", "{")
    broken = (("adapter_config.json", "it is not JSON"),)
    assert read_sidecars(tmp_path / "adapter_model.safetensors").broken == broken
    assert read_sidecars(tmp_path / "x.safetensors").broken == ()


def test_a_long_sidecar_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, "x.json", " " * MAX_SIDECAR + "{}")
    ((name, why),) = read_sidecars(tmp_path / "x.safetensors").broken
    assert name == "x.json" and "longer than" in why


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "NaN", "-Infinity", "1e-999", "0"])
def test_numbers_that_are_none(tmp_path: Path, number: str) -> None:
    put(tmp_path, "x.json", f'{{"preferred weight": {number}}}')
    found = read_sidecars(tmp_path / "x.safetensors")
    assert (found.weight, found.files) == (None, ("x.json",))


def test_hostile_texts_of_a_header() -> None:
    facts = facts_from_metadata(
        {
            "ss_tag_frequency": '{"a": {"big": 1' + "0" * 4000 + ', "less": -3, "x": 2}}',
            "ss_training_started_at": "1e11",
            "ss_training_finished_at": "-5",
            "ss_training_comment": "c" * 10**6,
            "modelspec.trigger_phrase": ",".join(map(str, range(10**5))),
        }
    )
    assert facts.tags == (("x", 2),)
    assert facts.started_at == 1e11 and facts.finished_at is None
    assert facts.comment is not None and len(facts.comment) == MAX_WORD
    assert len(facts.trigger_words) == MAX_WORDS
    for texts in ({"ss_training_started_at": "1e12"}, {"ss_tag_frequency": "[" * 10**5}):
        assert facts_from_metadata(texts) == Facts()
