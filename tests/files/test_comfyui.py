"""ComfyUI's extra_model_paths.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafind.files.comfyui import EXTRA_PATHS, comfyui_lora_paths


def test_without_a_file_its_own_folder(tmp_path: Path) -> None:
    assert comfyui_lora_paths(tmp_path) == [tmp_path / "models" / "loras"]


def test_sections_defaults_and_several_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", "/mnt/models")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    (tmp_path / EXTRA_PATHS).write_text(
        """
a111:
    base_path: ../webui
    checkpoints: models/Stable-diffusion
    loras: |
        models/Lora
        models/LyCORIS

shared:
    base_path: ${MODELS}
    is_default: true
    loras: loras/
bare:
    loras: /abs/loras
home:
    base_path: ~/ai
    loras: [one, two]
no_loras:
    base_path: /x
    vae: vae
comment: text
"""
    )
    assert comfyui_lora_paths(tmp_path) == [
        tmp_path / "models" / "loras",
        Path("/mnt/models/loras"),
        tmp_path.parent / "webui" / "models" / "Lora",
        tmp_path.parent / "webui" / "models" / "LyCORIS",
        Path("/abs/loras"),
        Path("/home/someone/ai/one"),
        Path("/home/someone/ai/two"),
    ]


def test_an_empty_file_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / EXTRA_PATHS).write_text("# nothing\n")
    assert comfyui_lora_paths(tmp_path) == [tmp_path / "models" / "loras"]


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "just text"])
def test_what_is_no_mapping_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / EXTRA_PATHS).write_text(text)
    with pytest.raises(ValueError, match=EXTRA_PATHS):
        comfyui_lora_paths(tmp_path)
