"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz --corpus DIR``.

Inputs are bytes of safetensors and PyTorch files, and names, dtypes and shapes of tensors; each
goes through the reader, the plan, ΔW and the sketches (:mod:`tests.fuzz.subject`). What fails is
kept in ``findings`` below the corpus folder, with its traceback, and the run goes on; a process
that dies is started again. Ends with 1 where anything failed.

atheris is no dependency, for it has no wheels for every system: ``pip install atheris`` on Linux
with Python 3.11 to 3.13, or see https://github.com/google/atheris. Without it the same inputs are
tried at random by ``tests/fuzz/test_fuzz.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import targets

ROOT = Path(__file__).resolve().parents[2]
#: MiB of memory above which a process is stopped, and seconds that a single input may hang.
MEMORY, HANG = 1024, 20
#: Inputs of one process: caches by name and size fill up as they do in no use of the program.
EACH = 50_000


def main() -> int:
    """Fuzz for the time and the number of inputs asked for, whichever ends first."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs at most")
    parser.add_argument("--seconds", type=float, default=1800, help="seconds at most")
    parser.add_argument("--corpus", type=Path, help="folder of the inputs, made where it is new")
    parser.add_argument("--repeat", type=Path, help="try one kept input and end")
    asked = parser.parse_args()
    if asked.repeat:
        print(targets.one(asked.repeat.read_bytes()))
        return 0
    if asked.corpus is None:
        parser.error("--corpus DIR says where the inputs are kept")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed: see the beginning of tests/fuzz/__main__.py")
    shm = Path("/dev/shm")
    # Files that are read at once and never again belong into memory.
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as place:
        return _run(asked.corpus.resolve(), asked.runs, asked.seconds, place)


def _run(corpus: Path, runs: int, seconds: float, place: str) -> int:
    findings, inputs = corpus / "findings", corpus / "inputs"
    findings.mkdir(parents=True, exist_ok=True)
    if not inputs.exists():
        inputs.mkdir()
        for number, seed in enumerate(targets.seeds()):
            (inputs / f"seed-{number:03}").write_bytes(seed)
    words = corpus / "words.txt"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in targets.words()))
    began, before = time.monotonic(), _told(findings)[0]
    died = coverage = 0
    while True:
        done = _told(findings)[0] - before
        left = seconds - (time.monotonic() - began)
        if done >= runs or left <= 1:
            break
        log = corpus / "last.log"
        with log.open("wb") as file:
            ended = subprocess.run(
                [
                    *(sys.executable, "-m", "tests.fuzz.engine", str(findings), str(inputs)),
                    *(f"-runs={min(runs - done, EACH)}", f"-max_total_time={int(left)}"),
                    "-max_len=8192",
                    *(f"-rss_limit_mb={MEMORY}", f"-timeout={HANG}", f"-dict={words}"),
                    *(f"-artifact_prefix={findings}{os.sep}", "-reload=0", "-print_final_stats=1"),
                ],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "TMPDIR": place,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        text = log.read_text("utf-8", "replace")
        coverage = max([coverage, *map(int, re.findall(r" cov: (\d+)", text))])
        if ended.returncode:
            died += 1
            (findings / f"died-{died}-{int(time.time())}.log").write_text(text[-20_000:])
            print(f"a process ended with {ended.returncode}: {text.strip().splitlines()[-1:]}")
            if not done and died > 3:
                break
    total, outcomes, found = _told(findings)
    print(
        f"{total - before:,} inputs, {time.monotonic() - began:,.0f} s, {coverage:,} edges covered"
    )
    for outcome, count in outcomes.most_common():
        print(f"{count:>10,}  {outcome}")
    for name, count in found.most_common():
        print(f"{count:>10,}  FAILED {name}")
    print(f"{died} processes died" if died else "no process died")
    return 1 if found or died else 0


def _told(findings: Path) -> tuple[int, Counter[str], Counter[str]]:
    """Inputs, outcomes and failures of all processes so far."""
    inputs, outcomes, found = 0, Counter[str](), Counter[str]()
    for path in findings.glob("told-*.json"):
        told = json.loads(path.read_text())
        inputs += told["inputs"]
        outcomes.update(told["outcomes"])
        found.update(told["found"])
    return inputs, outcomes, found


def _escaped(word: str) -> str:
    return "".join(c if c.isalnum() or c in "._-[]:{}" else f"\\x{ord(c):02x}" for c in word)


if __name__ == "__main__":
    sys.exit(main())
