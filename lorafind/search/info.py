"""All that one file tells about itself: its weights, its header's texts, its sidecars, its hashes.

What the header alone can tell needs neither torch nor numpy.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafind.files import sidecars
from lorafind.files.header import Header
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import handled, state
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.architectures import candidates
from lorafind.formats.groups import GROUPS
from lorafind.formats.plan import weights_of
from lorafind.search.looking import Looked, Weighed, all_of, finite, header_of, magnitudes_of

#: Outcomes of files that were read and understood; every other is a file that could not be read.
UNDERSTOOD = frozenset(
    {
        *("lora", "zero", "invalid", "empty", "embedding", "checkpoint", "vae", "hypernetwork"),
        *("controlnet", "unsupported"),
    }
)
#: Kinds of :attr:`Plan.keys`.
KINDS = ("module", "extra", "leftover", "orphan", "unknown")
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

    Every field is always there, but for those on request; unknown ones are None, or empty. Numbers
    are finite; texts of the file and of what stands beside it are theirs, not ours.

    The file:
      path; outcome: a word of :data:`lorafind.files.outcome.OUTCOMES`; reason: one sentence, empty
      for ``lora``; read: ``all`` or ``header``; size: in bytes; name: for people.
    The adapter:
      architecture, family, spelling: as in :class:`Plan`; candidates: the architectures that it may
      be for, one where that is known; rank: None where it varies; ranks: rank → number of modules;
      alpha: None where none is stored or it varies; alphas: alpha or ``none`` → number of modules;
      scale: what multiplies B·A, None where it varies; dtype; effective_dtype: the coarsest through
      which the weights round-trip.
    Its modules:
      modules: their number; zero_modules: those with ΔW = 0; parameters: those that hold parameters
      of a rotation or rescaling and no ΔW, which are compared as such and are in no norm below;
      norm: ‖ΔW‖ (Frobenius); groups: group → {modules, norm, share of ‖ΔW‖²}; components: the same
      by the part of the model; per_module: list of {name, group, family, parameters, shape: [o, n],
      rank, alpha, scale, norm, magnitude}, where rank or alpha vary or on request.
    What is not ΔW:
      magnitudes: list of {module, key, numbers, norm} of DoRA's magnitudes; embeddings: list of
      {name, tensors: keys, vectors, width}; extras: name → key of all else that acts beside ΔW;
      unknown_keys: not understood; unread_keys: these, and what may act on the picture and is not
      read; key_counts: kind (``module``, ``extra``, ``leftover``, ``orphan``, ``unknown``) →
      number of keys.
    What is said of it:
      facts: of the training, in the header (:class:`Facts`); config: of adapter_config.json; hints:
      what texts say of the architecture; sidecar: as in :class:`Sidecar`; notes: sentences.
    Its hashes:
      hashes: {sha256, autov1, autov2, autov3, sshs_model_hash, sshs_legacy_hash, content}, lower
      case hex, empty where the file cannot be read; recorded: list of {name, value, stale} that
      the file or a sidecar claims; stale is None where that cannot be told.
    On request:
      keys: key → how it was understood: ``module:<name>``, ``extra:<name>`` (``a + b`` for a tensor
      of several modules, as where a layer is fused), ``leftover`` or ``leftover:<why>`` (has no
      effect), ``orphan`` (its other half is missing), ``unknown``, or ``unread`` for every key of a
      file that is no adapter; tensors: key → {dtype, shape, bytes}.
    """
    path = handled(path)
    looked = header_of(path) if header_only else all_of(path, allow_pickle)
    return _Told(looked).to_json(keys, modules)


@dataclass(frozen=True)
class _Told:
    file: Looked

    def to_json(self, keys: bool, modules: bool) -> dict[str, Any]:
        path, plan, header = self.file.path, self.file.plan, self.file.header
        metadata = header.metadata if header is not None else {}
        facts = sidecars.facts_from_metadata(metadata)
        beside = sidecars.read_sidecars(path)
        try:
            config = sidecars.adapter_config(path)
        except NotAnAdapter:
            # The outcome says that a store does not answer.
            config = None
        claims = dict(facts.claimed_hashes)
        if beside.sha256:
            claims["sidecar sha256"] = beside.sha256
        adapter = self.file.adapter
        row: dict[str, Any] = {
            "path": os.fspath(path),
            "outcome": self.file.outcome,
            "reason": self.file.reason,
            "read": "all" if self.file.whole else "header",
            "size": _size(path),
            "name": sidecars.display_name(path, beside, facts),
            **_written(plan, header),
            **self._modules(modules),
            **self._norms(),
            "effective_dtype": adapter.effective_dtype if adapter is not None else None,
            "facts": {k: v for k, v in asdict(facts).items() if k != "claimed_hashes"},
            "config": {k: config[k] for k in SETTINGS if k in config} if config else {},
            "hints": plan.hints if plan is not None else sidecars.hints(metadata),
            "sidecar": asdict(beside),
            **self._beside(),
            "hashes": self._hashes(),
            "recorded": [r.to_json() for r in self.file.recorded(claims)],
            "notes": [],
        }
        row["notes"] = [*(plan.notes if plan is not None else ()), *_remarks(plan)]
        row["notes"] += _disagreements(row)
        if keys:
            every = header.tensors if header is not None else {}
            row["keys"] = plan.keys if plan is not None else dict.fromkeys(every, "unread")
            row["tensors"] = {
                key: {"dtype": t.dtype, "shape": list(t.shape), "bytes": t.end - t.begin}
                for key, t in every.items()
            }
        return row

    def _beside(self) -> dict[str, Any]:
        """What is not ΔW, and what became of the keys."""
        plan, header = self.file.plan, self.file.header
        if plan is None or header is None:
            lists = ("magnitudes", "embeddings", "unknown_keys", "unread_keys")
            return {**{name: [] for name in lists}, "extras": {}, "key_counts": {}}
        magnitudes = dict.fromkeys(magnitudes_of(plan))
        kinds = Counter(how.partition(":")[0] for how in plan.keys.values())
        return {
            "magnitudes": [
                {
                    "module": name.partition(".dora_scale")[0],
                    "key": plan.extras[name],
                    "numbers": _numbers(plan, header, name),
                    "norm": finite(self.file.magnitudes.get(name)),
                }
                for name in magnitudes
            ],
            "embeddings": _embeddings(plan, header),
            "extras": {
                name: key
                for name, key in plan.extras.items()
                if name not in magnitudes and _embedding_name(key) is None
            },
            "unknown_keys": plan.unknown_keys,
            "unread_keys": plan.unread_keys,
            "key_counts": {kind: kinds[kind] for kind in KINDS},
        }

    def _modules(self, every: bool) -> dict[str, Any]:
        plan, weighed = self.file.plan, self.file.weighed
        if plan is None:
            none = ("rank", "alpha", "scale", "modules", "zero_modules", "parameters")
            return {**dict.fromkeys(none), **{"ranks": {}, "alphas": {}, "per_module": []}}
        magnitudes = {
            name.partition(".dora_scale")[0]: norm for name, norm in self.file.magnitudes.items()
        }
        rows = [_module(m, weighed.get(m.name), magnitudes.get(m.name)) for m in plan.modules]
        weights = [
            row for row, module in zip(rows, plan.modules, strict=True) if not module.place.vector
        ]
        # Biases and norms have a rank of 1 by their form, which says nothing.
        ranks = Counter(row["rank"] for row in weights or rows)
        known = self.file.adapter is not None
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
            "zero_modules": sum(w.square == 0 for w in weighed.values()) if known else None,
            "parameters": sum(m.parameters for m in plan.modules),
            "per_module": rows if every or vary else [],
        }

    def _norms(self) -> dict[str, Any]:
        plan = self.file.plan
        if plan is None:
            return {"norm": None, "groups": {}, "components": {}}
        known = bool(self.file.weighed)
        squares = {
            m.name: w.square
            for m in plan.modules
            if (w := self.file.weighed.get(m.name)) and not m.parameters
        }
        total = math.fsum(squares.values())

        def parts(of: Callable[[ModulePlan], str], order: tuple[str, ...]) -> dict[str, Any]:
            found: dict[str, list[float]] = {}
            for module in plan.modules:
                found.setdefault(of(module), []).append(squares.get(module.name, 0.0))
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
        file = self.file
        if file.digests is None:
            return {}
        content = None
        if file.header is not None and file.data_sha256 is not None:
            content = file.header.content(file.data_sha256)
        return {**file.digests.to_json(), "content": content}


def _module(module: ModulePlan, weighed: Weighed | None, magnitude: float | None) -> dict[str, Any]:
    return {
        "name": module.name,
        "group": module.place.group,
        "family": module.family,
        "parameters": module.parameters,
        "shape": list(module.shape),
        "rank": module.rank,
        "alpha": weighed.alpha if weighed else None,
        "scale": weighed.scale if weighed else None,
        "norm": math.sqrt(weighed.square) if weighed else None,
        "magnitude": finite(magnitude),
    }


def _written(plan: Plan | None, header: Header | None) -> dict[str, Any]:
    """What names and shapes say."""
    if plan is None or header is None:
        none = dict.fromkeys(("architecture", "family", "spelling", "dtype"))
        return {**none, "candidates": []}
    return {
        "architecture": plan.architecture,
        "candidates": list(candidates(plan.architecture)),
        "family": plan.family,
        "spelling": plan.spelling,
        "dtype": weights_of(plan, header)[1],
    }


def _size(path: Path | str) -> int | None:
    try:
        return state(path).st_size
    except OSError:
        # The outcome says what is wrong with the path.
        return None


def _only(counts: Counter[Any]) -> Any:
    """The one value that all have."""
    return next(iter(counts)) if len(counts) == 1 else None


def _embeddings(plan: Plan, header: Header) -> list[dict[str, Any]]:
    """Bundled textual inversions: ``bundle_emb.<name>.<tensor>`` and ``<token>``."""
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


def _numbers(plan: Plan, header: Header, name: str) -> int:
    """How many numbers an extra has."""
    if name in plan.cuts:
        start, stop = plan.cuts[name]
        return stop - start
    return math.prod(header.tensors[plan.extras[name]].shape)


def _remarks(plan: Plan | None) -> list[str]:
    """What the numbers are, where they are no ΔW."""
    modules = [m for m in plan.modules if m.parameters] if plan is not None else []
    if not modules:
        return []
    families = ", ".join(sorted({m.family for m in modules}))
    return [
        f"{len(modules)} modules ({families}) hold parameters that only the base model makes a ΔW: "
        "they are compared as parameters, with their like"
    ]


def _disagreements(row: Mapping[str, Any]) -> list[str]:
    """Where texts say something else than the weights."""
    found = []
    said, seen = row["hints"].get("architecture"), row["architecture"]
    if said and seen and said not in candidates(seen):
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
