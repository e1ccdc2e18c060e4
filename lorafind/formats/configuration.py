"""What a PEFT configuration says of the scale: alpha, r and rsLoRA per module.

Three places: ``adapter_config.json`` beside the file (PEFT); the text ``lora_adapter_metadata`` in
the header, the same per component (diffusers); and single texts there, ``lora_alpha`` and ``r``,
with or without a component (SimpleTuner, LightX2V; read by SGLang). Files without alpha keys need
them. ``ss_network_alpha`` is not among them: it repeats the alpha keys, and no program applies it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lorafind.formats.families import Scale

#: The header's text, written by diffusers.
METADATA_KEY = "lora_adapter_metadata"
#: Single texts of the header: setting → how it is called, the first counts.
SINGLE = {"lora_alpha": ("lora_alpha", "network_alpha", "alpha"), "r": ("r",)}

#: Component → how diffusers calls it in that text.
PARTS = {"te1": ("text_encoder",), "te2": ("text_encoder_2",), "te3": ("text_encoder_3",)}


@dataclass(frozen=True)
class Configuration:
    """The settings by component (``""``: of all)."""

    parts: dict[str, Mapping[str, Any]]

    def scale(self, component: str, module: str, alpha: str | None) -> Scale:
        """The Scale of a module. module: its dotted name; alpha: the key of a stored alpha."""
        if alpha is not None or not self.parts:
            return Scale(alpha)
        for name in ("", *PARTS.get(component, ("unet", "transformer"))):
            part = self.parts.get(name)
            if part is not None:
                return self._scale(part, module)
        return Scale()

    @staticmethod
    def _scale(part: Mapping[str, Any], module: str) -> Scale:
        alpha = _number(part.get("lora_alpha", part.get("alpha")))
        rank = _number(part.get("r"))
        patterns = part.get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if _matches(pattern, module):
                alpha = _number(value)
                break
        patterns = part.get("rank_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if _matches(pattern, module):
                rank = _number(value)
                break
        return Scale(None, alpha, int(rank) if rank else None, part.get("use_rslora") is True)


def _number(value: object) -> float | None:
    # JSON knows infinity, and integers that no float holds.
    return float(value) if isinstance(value, int | float) and 0 < value < 2.0**53 else None


def _matches(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern, a regular expression, ends the module's name."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def of_header(metadata: Mapping[str, str]) -> dict[str, str]:
    """The texts of a header that say something of the scale."""
    words = {word for names in SINGLE.values() for word in names}
    return {
        key: text
        for key, text in metadata.items()
        if key == METADATA_KEY or key.rpartition(".")[2] in words
    }


def read(metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> Configuration:
    """The configuration of a file; an unreadable one is as none."""
    if config is not None:
        return Configuration({"": config})
    text = metadata.get(METADATA_KEY)
    if text is None:
        return Configuration(_single(metadata))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return Configuration({})
    parts: dict[str, dict[str, Any]] = {}
    if isinstance(found, dict):
        for key, value in found.items():
            name, _, setting = key.rpartition(".")
            parts.setdefault(name, {})[setting] = value
    return Configuration(dict(parts))


def _single(metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """The settings that stand alone in a header, by component; those without alpha say nothing."""
    parts: dict[str, dict[str, float]] = {}
    for setting, names in SINGLE.items():
        for name in reversed(names):
            for key, text in metadata.items():
                part, _, word = key.rpartition(".")
                if word == name:
                    with suppress(ValueError):
                        parts.setdefault(part, {})[setting] = float(text)
    return {part: found for part, found in parts.items() if "lora_alpha" in found}
