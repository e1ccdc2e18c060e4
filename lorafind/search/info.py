"""All that one file tells about itself: its weights, its header's texts, its sidecars, its hashes.

What the header alone can tell needs neither torch nor numpy.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind.files import hashes, safetensors, sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import Header
from lorafind.files.sniff import is_pickled
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.groups import GROUPS
from lorafind.formats.plan import plan_of, weights_of

if TYPE_CHECKING:
    from lorafind.formats.adapter import Adapter
    from lorafind.formats.delta import Delta
    from lorafind.formats.read import Reading

#: Outcomes of files that were read and understood; every other is a file that could not be read.
UNDERSTOOD = frozenset(
    {
        *("lora", "zero", "invalid", "empty", "embedding", "checkpoint", "vae", "hypernetwork"),
        *("controlnet", "unsupported"),
    }
)
#: What of adapter_config.json is shown.
SETTINGS = (
    *("peft_type", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path"),
)


def info(
    path: str | os.PathLike[str],
    *,
    header_only: bool = False,
    allow_pickle: bool = False,
    keys: bool = False,
    modules: bool = False,
) -> dict[str, Any]:
    """Everything about one file, in plain values. Never raises for a bad file.

    header_only: nothing but the header is read, and torch is not imported; norms, the effective
    dtype, hashes and the outcomes ``zero`` and ``invalid`` are then not known. keys: say of every
    key how it was understood. modules: list every module even where all are alike.

    Fields, None (or empty) where they are not known:
      path, outcome (``lora`` or what the file is instead), reason (one sentence), read (``all`` or
      ``header``), size (bytes), name (for people);
      architecture, family, spelling as in :class:`Plan`; rank (None where it varies), ranks (rank →
      number of modules), alpha (None where none is stored or it varies), alphas (alpha or ``none``
      → number of modules), scale (None where it varies; scale multiplies B·A);
      modules (their number), zero_modules (those with ΔW = 0), per_module (list of name, group,
      family, shape, rank, alpha, scale, norm; where rank or alpha vary, or on request);
      norm (‖ΔW‖, Frobenius), groups (group → modules, norm, share of ‖ΔW‖²), components (the same);
      dtype, effective_dtype (the coarsest through which the weights round-trip);
      facts (training, from the header; as in :class:`Facts`), config (of adapter_config.json),
      hints (what texts say of the architecture), sidecar (as in :class:`Sidecar`);
      embeddings (list of name, tensors, vectors, width), extras (name → key of what acts beside
      ΔW);
      hashes (sha256, autov1, autov2, autov3, sshs_model_hash, sshs_legacy_hash, content),
      recorded (list of name, value, stale: hashes that the file or a sidecar claims; stale None
      where that cannot be told); unknown_keys (not understood), notes (sentences);
      keys (key → how it was understood; on request).
    """
    file = _File(Path(path))
    if header_only:
        file.read_header()
    else:
        file.read_all(allow_pickle)
    return file.to_json(keys, modules)


@dataclass
class _Weighed:
    """A module's numbers that only its tensors tell. square: ‖ΔW‖²."""

    scale: float
    square: float


@dataclass
class _File:
    path: Path
    outcome: str = ""
    reason: str = ""
    read: str = "all"
    header: Header | None = None
    plan: Plan | None = None
    adapter: Adapter | None = None
    sha256: str | None = None
    data_sha256: str | None = None
    digests: hashes.Hashes | None = None
    weighed: dict[str, _Weighed] = field(default_factory=dict)

    # -- reading

    def read_header(self) -> None:
        """Header and plan, without torch."""
        self.read = "header"
        try:
            if is_pickled(self.path):
                why = f"{self.path.name} is a PyTorch file, which has no header to read"
                raise NotAnAdapter("pickle", why)
            self.header = safetensors.read_header(self.path)
            self.plan = plan_of(self.header, sidecars.adapter_config(self.path))
            self.outcome = "lora"
        except NotAnAdapter as error:
            self.outcome, self.reason = error.outcome, error.reason

    def read_all(self, allow_pickle: bool) -> None:
        """Every number and every byte."""
        from lorafind.formats.read import read

        reading = read(self.path, allow_pickle, visit=self._weigh)
        self.outcome, self.reason = reading.outcome, reading.reason
        self.plan, self.adapter = reading.plan, reading.adapter
        self.sha256, self.data_sha256 = reading.sha256, reading.data_sha256
        self.header = reading.header
        if self.outcome == "zero" and self.plan is not None and self.adapter is not None:
            for module in self.plan.modules:
                self._weigh(module, self.adapter.modules[module.name])
        self._hash(reading)

    def _weigh(self, module: ModulePlan, delta: Delta) -> None:
        square = 0.0 if delta.is_zero else delta.squared_norm()
        self.weighed[module.name] = _Weighed(delta.scale, square)

    def _hash(self, reading: Reading) -> None:
        stored = None
        try:
            if not is_pickled(self.path):
                stored = reading.header or safetensors.read_header(self.path)
        except NotAnAdapter:
            # No safetensors file: of its hashes those of the plain bytes remain.
            stored = None
        self.header = self.header or stored
        try:
            # A PyTorch file has no data section of its own.
            data = self.data_sha256 if stored is not None else None
            self.digests = hashes.hashes(self.path, stored, self.sha256, data)
        except NotAnAdapter:
            # The reason stands in the outcome: what cannot be read has no hash.
            self.digests = None

    # -- telling

    def to_json(self, keys: bool, modules: bool) -> dict[str, Any]:
        plan, header = self.plan, self.header
        metadata = header.metadata if header is not None else {}
        facts = sidecars.facts_from_metadata(metadata)
        beside = sidecars.read_sidecars(self.path)
        config = sidecars.adapter_config(self.path)
        row: dict[str, Any] = {
            "path": os.fspath(self.path),
            "outcome": self.outcome,
            "reason": self.reason,
            "read": self.read,
            "size": _size(self.path),
            "name": sidecars.display_name(self.path, beside, facts),
            **_written(plan, header),
            **self._modules(modules),
            **self._norms(),
            "effective_dtype": self.adapter.effective_dtype if self.adapter is not None else None,
            "facts": {k: v for k, v in asdict(facts).items() if k != "claimed_hashes"},
            "config": {k: config[k] for k in SETTINGS if k in config} if config else {},
            "hints": plan.hints if plan is not None else sidecars.hints(metadata),
            "sidecar": asdict(beside),
            "embeddings": _embeddings(plan, header),
            "extras": _other_extras(plan),
            "hashes": self._hashes(),
            "recorded": [r.to_json() for r in self._recorded(facts, beside)],
            "unknown_keys": plan.unknown_keys if plan is not None else [],
            "notes": [],
        }
        row["notes"] = [*(plan.notes if plan is not None else ()), *_disagreements(row)]
        if keys:
            row["keys"] = plan.keys if plan is not None else {}
        return row

    def _modules(self, every: bool) -> dict[str, Any]:
        plan = self.plan
        if plan is None:
            return {
                **dict.fromkeys(("rank", "alpha", "scale", "modules", "zero_modules")),
                **{"ranks": {}, "alphas": {}, "per_module": []},
            }
        rows = [self._module(module) for module in plan.modules]
        weights = [
            row for row, module in zip(rows, plan.modules, strict=True) if not module.place.vector
        ]
        # Biases and norms have a rank of 1 by their form, which says nothing.
        ranks = Counter(row["rank"] for row in weights or rows)
        known = self.adapter is not None
        alphas = Counter(row["alpha"] for row in rows) if known else Counter()
        scales = {row["scale"] for row in rows}
        vary = len(ranks) > 1 or len(alphas) > 1
        return {
            "rank": _only(ranks),
            "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
            "alpha": _only(alphas),
            "alphas": {
                "none" if alpha is None else f"{alpha:g}": count
                for alpha, count in sorted(alphas.items(), key=lambda i: (i[0] is None, i[0] or 0))
            },
            "scale": scales.pop() if known and len(scales) == 1 else None,
            "modules": len(rows),
            "zero_modules": sum(w.square == 0 for w in self.weighed.values()) if known else None,
            "per_module": rows if every or vary else [],
        }

    def _module(self, module: ModulePlan) -> dict[str, Any]:
        weighed = self.weighed.get(module.name)
        alpha = None
        if self.adapter is not None and module.alpha is not None:
            alpha = float(self.adapter.fetch(module.alpha).item())
        return {
            "name": module.name,
            "group": module.place.group,
            "family": module.family,
            "shape": list(module.shape),
            "rank": module.rank,
            "alpha": alpha,
            "scale": weighed.scale if weighed else None,
            "norm": math.sqrt(weighed.square) if weighed else None,
        }

    def _norms(self) -> dict[str, Any]:
        if self.plan is None:
            return {"norm": None, "groups": {}, "components": {}}
        known = bool(self.weighed)
        total = math.fsum(w.square for w in self.weighed.values())

        def parts(of: Callable[[ModulePlan], str], order: tuple[str, ...]) -> dict[str, Any]:
            assert self.plan is not None
            found: dict[str, list[float]] = {}
            for module in self.plan.modules:
                weighed = self.weighed.get(module.name)
                found.setdefault(of(module), []).append(weighed.square if weighed else 0.0)
            names = [name for name in order if name in found] or list(found)
            return {
                name: {
                    "modules": len(found[name]),
                    "norm": math.sqrt(math.fsum(found[name])) if known else None,
                    "share": math.fsum(found[name]) / total if total else None,
                }
                for name in names
            }

        return {
            "norm": math.sqrt(total) if known else None,
            "groups": parts(lambda m: m.place.group, GROUPS),
            "components": parts(lambda m: m.place.component, ()),
        }

    def _hashes(self) -> dict[str, str | None]:
        if self.digests is None:
            return {}
        content = None
        if self.header is not None and self.data_sha256 is not None:
            content = self.header.content(self.data_sha256)
        return {**self.digests.to_json(), "content": content}

    def _recorded(self, facts: sidecars.Facts, beside: sidecars.Sidecar) -> list[hashes.Recorded]:
        claims = dict(facts.claimed_hashes)
        if beside.sha256:
            claims["sidecar sha256"] = beside.sha256
        header = self.header
        if header is None:
            return hashes.recorded(claims, self.digests)
        by_name = partial(hashes.by_sorted_name, self.path, header)
        return hashes.recorded(claims, self.digests, by_name)


def _written(plan: Plan | None, header: Header | None) -> dict[str, Any]:
    """What names and shapes say."""
    if plan is None or header is None:
        return dict.fromkeys(("architecture", "family", "spelling", "dtype"))
    return {
        "architecture": plan.architecture,
        "family": plan.family,
        "spelling": plan.spelling,
        "dtype": weights_of(plan, header)[1],
    }


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        # The outcome says what is wrong with the path.
        return None


def _only(counts: Counter[Any]) -> Any:
    """The one value that all have."""
    return next(iter(counts)) if len(counts) == 1 else None


def _embeddings(plan: Plan | None, header: Header | None) -> list[dict[str, Any]]:
    """Bundled textual inversions: ``bundle_emb.<name>.<tensor>`` and ``<token>``."""
    if plan is None or header is None:
        return []
    found: dict[str, list[str]] = {}
    for key in plan.extras.values():
        if (name := _embedding_name(key)) is not None:
            found.setdefault(name, []).append(key)
    rows = []
    for name, tensors in found.items():
        shapes = [header.tensors[key].shape for key in tensors]
        rows.append(
            {
                "name": name,
                "tensors": tensors,
                "vectors": max(math.prod(shape[:-1]) for shape in shapes),
                "width": max(shape[-1] if shape else 1 for shape in shapes),
            }
        )
    return rows


def _embedding_name(key: str) -> str | None:
    if key[:1] == "<" and key[-1:] == ">":
        return key
    if not key.startswith("bundle_emb."):
        return None
    name = key.removeprefix("bundle_emb.")
    head, param, _ = name.partition(".string_to_param")
    return head if param else name.rpartition(".")[0] or name


def _other_extras(plan: Plan | None) -> dict[str, str]:
    if plan is None:
        return {}
    return {name: key for name, key in plan.extras.items() if _embedding_name(key) is None}


def _disagreements(row: Mapping[str, Any]) -> list[str]:
    """Where texts say something else than the weights."""
    found = []
    said, seen = row["hints"].get("architecture"), row["architecture"]
    if said and seen and said not in seen.split("|"):
        known = "fit no known model" if seen.startswith("other:") else f"are those of {seen}"
        found.append(f"the metadata says {said}, but the weights {known}")
    dim = row["facts"]["dim"]
    if dim and dim.isdecimal() and row["ranks"] and dim not in row["ranks"]:
        ranks = ", ".join(row["ranks"])
        found.append(f"the metadata says rank {dim}, but the weights have {ranks}")
    for claim in row["recorded"]:
        if claim["stale"]:
            found.append(f"the recorded {claim['name']} is not that of these bytes")
    for name, why in row["sidecar"]["broken"]:
        found.append(f"the sidecar {name} cannot be read: {why}")
    return found
