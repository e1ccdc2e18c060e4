"""A comparison in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafind.relations.grades import Relation, Step

#: What is said of two LoRAs first, by grade.
GRADE = {
    "weights": "the same LoRA",
    "cast": "the same LoRA",
    "scaled": "the same LoRA at another strength",
    "part": "one is a part of the other",
    "resized": "one is the other at a lower rank",
    "reweighted": "one is the other with its blocks reweighted",
}


def summary(row: Mapping[str, Any], relation: Relation | None) -> dict[str, str]:
    """Topic → sentence, of the result of :func:`lorafind.search.compare.compare`."""
    told = {
        "Relation": _relation(relation, row),
        "A": _file(row["a"]),
        "B": _file(row["b"]),
        "Cosine": _cosine(row),
        "Strength": _strength(row),
        "Modules": _modules(row),
        "Style": _style(row["style"]),
        "Training": _training(row),
        "Base model": _base(row),
    }
    return {topic: text for topic, text in told.items() if text}


def _relation(relation: Relation | None, row: Mapping[str, Any]) -> str:
    if not row["comparable"]:
        pair = f"{row['a']['architecture']} and {row['b']['architecture']}"
        text = f"for different base models ({pair}): modules of one name are not the same layer"
        return f"{text}; yet {_told(relation, row)}" if relation is not None else text
    return _told(relation, row)


def _told(relation: Relation | None, row: Mapping[str, Any]) -> str:
    if relation is None:
        if not row["common"]:
            return "nothing to compare: they have no module in common"
        return "no common origin can be shown: their ΔW are no more alike than strangers' may be"
    if relation.grade == "file":
        return "the same file, byte for byte"
    if relation.grade == "tensors":
        return "the same LoRA: the same tensors, only metadata or the order of keys differ"
    turned = ", in the opposite direction" if relation.cosine < 0 else ""
    if relation.grade == "near":
        text = "nearly the same LoRA, but one does not follow from the other by any known step"
        return text + turned
    if relation.grade == "kin":
        same = "the same run" if row["same_session"] else "the same run, start, seed or ingredient"
        times = f", {abs(relation.cosine) / relation.chance:.0f} times what strangers reach"
        return f"kin{turned}: {same}{times if relation.chance else ''}"
    small, large = ("A", "B") if relation.larger == "y" else ("B", "A")
    text = GRADE[relation.grade]
    if relation.steps:
        return f"{text}: {small} is {large}, {', '.join(map(_step, relation.steps))}"
    ways = {"spelling": "spelled", "family": "in family", "rank": "at rank", "dtype": "stored as"}
    how = [
        f"{ways[fact]} {relation.differs[fact][0]} and {relation.differs[fact][1]}"
        for fact in ways
        if fact in relation.differs
    ]
    return f"{text}, {'; '.join(how)}" if how else f"{text}, written in another way"


def _step(step: Step) -> str:
    if step.kind == "dtype":
        return f"stored as {step.words}"
    return f"rounded to {step.words} bit for bit" if step.kind == "cast" else step.words


def _file(side: Mapping[str, Any]) -> str:
    ranks = list(side["ranks"])
    rank = "–".join(dict.fromkeys((ranks[0], ranks[-1]))) if ranks else ""
    dtype = side["dtype"]
    if side["effective_dtype"] != dtype:
        dtype += f" (really {side['effective_dtype']})"
    facts = [side["architecture"], side["family"], f"{side['spelling']} names"]
    facts += [f"rank {rank}"] if rank else []
    facts += [dtype, f"{side['modules']} modules", f"‖ΔW‖ {side['norm']:.6g}"]
    return f"{side['path']}: {', '.join(facts)}"


def _cosine(row: Mapping[str, Any]) -> str:
    if row["cosine"] is None:
        return ""
    text = f"{row['cosine']:.6f} over {_count(row['common'], 'module')}"
    if not (row["a"]["only"] or row["b"]["only"]):
        return f"{text}, all of both"
    return f"{text} in common; {row['cosine_all']:.6f} with what only one has as zero in the other"


def _strength(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    if abs(row["ratio"] - 1) < 1e-6:
        return "equal norms over the common modules"
    return f"‖B‖ is {row['ratio']:.6g} times ‖A‖ over the common modules"


def _modules(row: Mapping[str, Any]) -> str:
    said = []
    for name in "ab":
        side = row[name]
        if side["only"]:
            said.append(
                f"{_count(len(side['only']), 'module')} only in {name.upper()} "
                f"({side['share']:.1%} of its ‖ΔW‖² is in common modules)"
            )
    return "; ".join(said)


def _style(style: Mapping[str, Any]) -> str:
    parts = [f"{group} {part['cosine']:.4f}" for group, part in style["groups"].items()]
    if style["cosine"] is None:
        return ", ".join(parts)
    return f"{style['cosine']:.4f} without a basis ({', '.join(parts)})"


def _training(row: Mapping[str, Any]) -> str:
    if row["same_session"] is None:
        return ""
    return "the same session" if row["same_session"] else "different sessions"


def _base(row: Mapping[str, Any]) -> str:
    names = [row[side]["base_model_name"] or row[side]["base_model"] or "not said" for side in "ab"]
    if names == ["not said", "not said"]:
        return ""
    if row["same_base"]:
        return f"the same, as the files say ({names[0]})"
    return f"A: {names[0]}; B: {names[1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
