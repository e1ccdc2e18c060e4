"""The answer of ``whatis`` in a few sentences."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lorafind.search.whatis import UNPROVED, Answer, Guess, Related, stands_out

#: Relations that are told in full; of the others only their number.
SHOWN = 3

#: What the smaller one is of the larger, by grade.
OF = {
    "weights": "the same LoRA as",
    "cast": "a cast of",
    "scaled": "a scaled copy of",
    "part": "a part of",
    "resized": "a resize of",
    "reweighted": "a copy with other block weights of",
}

#: (grade, one session id) → what is said of all of them together.
ALIKE = [
    (grade, same_run, words)
    for grade, run, other in (
        ("near", "nearly {}, of the same run", "nearly {}, but none of them follows from another"),
        ("kin", "kin to {}, of the same run", "kin to {}: one run, seed, start or ingredient"),
        (UNPROVED, *["~likely related to {}, which is not proved"] * 2),
    )
    for same_run, words in ((True, run), (False, other))
]


def topics(answer: Answer) -> dict[str, str]:
    """Topic → sentence; what there is nothing to say of is left out."""
    if answer.outcome != "lora":
        told = {"What": _other(answer), "Copies": _copies(answer)}
    else:
        told = {
            "What": _what(answer),
            "Says": _says(answer),
            "Copies": _copies(answer),
            "Related": _related(answer),
            "Style": _style(answer),
            "Likely": _likely(answer),
        }
    return {topic: text for topic, text in told.items() if text}


def text(answer: Answer) -> str:
    """All sentences on one line."""
    return " ".join(topics(answer).values())


def _other(answer: Answer) -> str:
    reason = answer.reason.removeprefix(f"{os.path.basename(answer.path)}: ").rstrip(".")
    return f"No usable LoRA ({answer.outcome}): {reason}."


def _what(answer: Answer) -> str:
    dtype = answer.effective_dtype or ""
    if answer.dtype != answer.effective_dtype:
        dtype += f" stored as {answer.dtype}"
    facts = [f"family {answer.family}", f"rank {answer.rank}" if answer.rank else "", dtype]
    facts += ["1 module" if answer.modules == 1 else f"{answer.modules} modules"]
    away = {"gone": "; the file is gone", "offline": "; the file is offline"}
    where = away.get(answer.presence, "")
    return f"It is a LoRA for {answer.architecture} ({', '.join(filter(None, facts))}){where}."


def _says(answer: Answer) -> str:
    said = [f"is called {answer.name!r}"] if answer.name else []
    if answer.base_model:
        said.append(f"names the base model {answer.base_model}")
    if answer.trigger_words:
        said.append(f"gives the trigger words {', '.join(answer.trigger_words)}")
    return f"It {_listed(said)}." if said else ""


def _copies(answer: Answer) -> str:
    if not answer.copies:
        return ""
    return f"Its bytes are those of {_names(answer, answer.copies)}."


def _related(answer: Answer) -> str:
    proved = [r for r in answer.relations if r.grade not in ("near", "kin", UNPROVED)]
    said = [_relation(answer, r) for r in proved[:SHOWN]]
    if len(proved) > SHOWN:
        said.append(f"{len(proved) - SHOWN} more are copies of one kind or another.")
    for grade, same_run, words in ALIKE:
        group = [r for r in answer.relations if (r.grade, r.same_run) == (grade, same_run)]
        if group:
            said.append(f"It is {words.format(_cosines(answer, group))}.")
    if not said and not answer.copies:
        return "The index holds no copy and no relative of it."
    return " ".join(said)


def _cosines(answer: Answer, group: list[Related]) -> str:
    digits, mark = (4, "") if group[0].grade == "near" else (3, "")
    if group[0].grade == UNPROVED:
        digits, mark = 2, "~"
    names = [f"{_name(answer, r.path)} ({mark}{r.cosine:.{digits}f})" for r in group[:SHOWN]]
    return _listed(names if len(group) <= SHOWN else [*names, f"{len(group) - SHOWN} more"])


def _relation(answer: Answer, r: Related) -> str:
    name = _name(answer, r.path)
    if r.grade == "tensors":
        return f"It has the tensors of {name}: only metadata or the order of keys differ."
    small, large = (name, "it") if r.larger == "this" else ("It", name)
    how = [*r.steps]
    if r.grade == "part" and r.share is not None:
        how.append(f"{r.share:.1%} of ‖ΔW‖² kept")
    steps = f" ({', '.join(how)})" if how else ""
    return f"{small} is {OF[r.grade]} {large}{steps}."


def _style(answer: Answer) -> str:
    if not answer.nearest:
        return ""
    said = []
    for row in answer.nearest:
        z = "" if row["z"] is None else f", z {row['z']:.1f}"
        said.append(f"{_name(answer, row['path'])} (score {row['score']:.2f}{z})")
    text = f"Nearest in style {'are' if len(said) > 1 else 'is'} {_listed(said)}"
    return f"{text}." if any(map(stands_out, answer.nearest)) else f"{text}; none stands out."


def _likely(answer: Answer) -> str:
    said = []
    if answer.likely_base:
        said.append(_guess(answer, "base model", answer.likely_base))
    if answer.likely_trigger_words:
        said.append(_guess(answer, "trigger words", answer.likely_trigger_words))
    return " ".join(said)


def _guess(answer: Answer, what: str, guess: Guess) -> str:
    value = guess.value if isinstance(guess.value, str) else ", ".join(guess.value)
    name = _name(answer, guess.path)
    return f"Its likely {what}: {value}, a guess from {name} ({guess.because})."


def _name(answer: Answer, path: str) -> str:
    away = " (not there now)" if path in answer.missing else ""
    return os.path.basename(path) + away


def _names(answer: Answer, paths: Iterable[str]) -> str:
    names = [_name(answer, path) for path in paths]
    return _listed(names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"])


def _listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
