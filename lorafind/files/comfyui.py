"""Where ComfyUI keeps its LoRAs: ``extra_model_paths.yaml``.

Format: ``utils/extra_config.py`` of ComfyUI. Each section is a mapping; ``base_path`` (with ~ and
variables, relative to the file) stands before every entry; ``loras`` holds one path per line;
sections with ``is_default: true`` come first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

EXTRA_PATHS = "extra_model_paths.yaml"


def comfyui_lora_paths(directory: str | os.PathLike[str]) -> list[Path]:
    """LoRA folders of the ComfyUI in ``directory``: its own, then those of its yaml file.

    Folders that do not exist are listed too (a drive may be away). Raises ValueError, in one
    sentence, where the yaml file cannot be understood, OSError where it cannot be read.
    """
    home = Path(os.path.abspath(directory))
    paths = [home / "models" / "loras"]
    config = home / EXTRA_PATHS
    if config.exists():
        sections = _sections(config)
        sections.sort(key=lambda section: section.get("is_default") is not True)
        for section in sections:
            paths += _loras(section, home)
    return list(dict.fromkeys(paths))


def _sections(config: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(config.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no valid YAML: {error}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ValueError(f"{config} must be a mapping of sections.")
    return [section for section in content.values() if isinstance(section, dict)]


def _loras(section: dict[str, Any], home: Path) -> list[Path]:
    base = section.get("base_path")
    start = home / os.path.expandvars(os.path.expanduser(base)) if base else home
    entry = section.get("loras") or ""
    lines = entry if isinstance(entry, list) else str(entry).splitlines()
    return [
        Path(os.path.normpath(start / line.strip())) for line in map(str, lines) if line.strip()
    ]
