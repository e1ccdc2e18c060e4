"""Random headers, mutated files and made-up tensors: in the gate, a small share of the fuzzing.

``python -m tests.fuzz`` looks for hours, guided by coverage; this tries the same at random, and
all that was ever found.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafind.files.outcome import OUTCOMES
from tests.fuzz import grammar, subject, targets
from tests.fuzz.source import Source
from tests.fuzz.watch import Executed, TooSlow, peak, watched

#: Bytes of memory that all examples together may need beside what is there already.
MEMORY = 700 * 2**20
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = list(targets.seeds())


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    """Tables and caches are filled before anything is timed, and memory is counted at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in SEEDS[:8]:
        targets.one(name)
    before = peak() if sys.platform != "win32" else 0
    yield
    torch.set_num_threads(threads)
    if sys.platform != "win32":
        assert peak() - before < MEMORY


# ---------------------------------------------------------------------------- the watch itself


def test_the_watch_sees_what_is_done() -> None:
    wicked: tuple[Callable[[], object], ...] = (
        lambda: __import__("os").system("true"),
        lambda: __import__("subprocess").Popen(["true"]),
        lambda: Path("x").write_bytes(b""),
        lambda: __import__("os").remove("x"),
    )
    for action in wicked:
        with pytest.raises(Executed), watched():
            action()
    with pytest.raises(TooSlow), watched(0.01):
        sum(range(10**6))
    with watched():
        Path(__file__).read_bytes()


def test_choices_are_within_bounds_and_end_in_zeros() -> None:
    source = Source(bytes(range(256)))
    assert all(0 <= source.number(0, 2) <= 2 for _ in range(40))
    assert 1000 <= source.number(1000, 70000) <= 70000
    empty = Source(b"")
    assert (empty.number(3, 9), empty.pick("abc"), empty.text(5)) == (3, "a", "")
    assert not any(empty.seldom(n) for n in range(2, 9))


def test_the_seeds_reach_every_family_and_the_end_of_the_way() -> None:
    """A fuzzer that is refused at the door finds nothing."""
    outcomes = Counter(targets.one(seed) for seed in SEEDS)
    assert outcomes["file lora"] > 5 and outcomes["text lora"] > 60
    assert len({outcome for outcome in outcomes if outcome.startswith("names")}) >= 3
    understood = Counter[str]()
    for make in grammar.FAMILIES.values():
        stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
        made = {
            stem + s: grammar.Described("F32", shape) for s, shape in make(64, 48, 4, ()).items()
        }
        data = targets.whole(targets.header(made))
        understood[targets.one(b"\x03" + targets.header(made))] += 1
        assert subject.bytes_of_header(data) == "lora"
    assert understood["file lora"] > 25, understood


# ---------------------------------------------------------------------------- at random


@settings(quick, max_examples=800)
@given(st.binary(max_size=400))
def test_any_tensors_are_understood_or_named(data: bytes) -> None:
    outcome = subject.names(Source(data))
    assert outcome in OUTCOMES or outcome in ("large", "understood")


@settings(quick, max_examples=250)
@given(st.binary(min_size=60, max_size=400))
def test_any_tensors_are_bound_and_sketched(data: bytes) -> None:
    subject.names(Source(b"\0" + data))


def mutated(data: st.DataObject, seed: bytes) -> bytes:
    """A seed with some bytes replaced, left out, put in or said twice."""
    made = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(1, len(made)))
        kind = data.draw(st.integers(0, 3))
        if kind == 0:
            made[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == 1:
            del made[at : at + data.draw(st.integers(1, 20))]
        elif kind == 2:
            word = data.draw(st.sampled_from(WORDS)).encode()
            made[at : at + data.draw(st.sampled_from((0, len(word))))] = word
        else:
            made[at:at] = made[at : at + data.draw(st.integers(1, 60))]
    return bytes(made)


WORDS = targets.words()
FILES = [b"\x03" + seed[1:] for seed in SEEDS if seed[0] in (2, 3)]
OTHERS = [seed for seed in SEEDS if seed[0] in (1, 6, 7)]


@settings(quick, max_examples=400)
@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    made = mutated(data, data.draw(st.sampled_from(FILES + OTHERS)))
    targets.one(made[:1] + made[1:])


@settings(quick, max_examples=400)
@given(st.data())
def test_mutated_headers_are_judged_as_the_reference_judges_them(data: st.DataObject) -> None:
    made = mutated(data, data.draw(st.sampled_from(FILES)))
    subject.bytes_of_header(targets.whole(made[1:]))


@settings(quick, max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_judged_as_the_reference_judges_them(data: bytes, length: int) -> None:
    subject.bytes_of_header(data)
    subject.bytes_of_header(length.to_bytes(8, "little") + data)
