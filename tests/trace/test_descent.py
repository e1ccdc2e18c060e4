"""``trace --all``: tree, DOT and JSON say the same, have no circle, and survive Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafind.api import Index
from lorafind.index.progress import Silent
from lorafind.trace import pursuit, survey
from lorafind.trace.descent import dot, tree
from lorafind.trace.origin import Parent, Trace
from tests.relations.made import trained
from tests.trace.made import concatenated
from tests.trace.test_trace import SHAPES, run, write

#: A quoted string of DOT: a quote and a backslash are escaped, nothing else.
QUOTED = r'"((?:[^"\\]|\\.)*)"'
STRANGE = 'q"uote \\N [x];-> line'


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("descent")
    few = dict(list(SHAPES.items())[:8])
    loras = [trained(few, 4, seed=k, alpha=2.0) for k in range(6)]
    for k, modules in enumerate(loras):
        write(folder / "l" / f"p{k}.safetensors", modules)
    write(folder / "l" / f"{STRANGE}.safetensors", concatenated(loras[:2], [0.7, 0.4], torch.half))
    with Index.open(folder / "x.db", write=True) as index:
        index.build([folder / "l"], device="cpu")
    return folder


def test_three_forms_of_one_descent(collection: Path) -> None:
    told = json.loads(run(collection, "--all", "--json").stdout)
    edges = {(p["path"], one["path"], p["kind"]) for one in told for p in one["parents"]}
    merge = str(collection / "l" / f"{STRANGE}.safetensors")
    assert edges == {(str(collection / f"l/p{k}.safetensors"), merge, "sum") for k in (0, 1)}
    graph = run(collection, "--all", "--dot").stdout.splitlines()
    assert graph[0] == "digraph descent {" and graph[-1] == "}"
    found = [re.fullmatch(rf"  {QUOTED} -> {QUOTED} \[label={QUOTED}\];", x) for x in graph]
    assert {(one[1], one[2], one[3].split()[0]) for one in found if one} == {
        (parent, merge.replace("\\", "\\\\").replace('"', '\\"'), kind) for parent, _, kind in edges
    }
    nodes = [re.fullmatch(rf"  {QUOTED} \[label={QUOTED}\];", x) for x in graph]
    assert sum(map(bool, nodes)) == 3
    assert sum(map(bool, nodes)) + sum(map(bool, found)) + 3 == len(graph)
    done = run(collection, "--all")
    # Off a terminal: a row per parent. Strangers are not read, and that is said.
    assert {tuple(line.split("\t")[i] for i in (1, 0, 5)) for line in done.stdout.splitlines()} == {
        (parent, merge.replace("\\", "\\\\") if "\\\\" in done.stdout else merge, kind)
        for parent, _, kind in edges
    }
    assert "4 of 7 LoRAs resemble no other beyond chance" in done.stderr


def test_the_survey_takes_what_the_shortlist_would(collection: Path) -> None:
    with Index.open(collection / "x.db") as index:
        chunks = index.store.chunks
        hot = survey.resembling(lambda: chunks.scan("identity", "other"), lambda count: None)
        for ids, rows in chunks.scan("identity", "other"):
            for number, row in zip(ids.tolist(), rows, strict=True):
                norms = row["norms"].astype(float)
                best = pursuit.shortlist(
                    row["sketch"].astype(float) * norms[:, None],
                    np.zeros(len(norms)),
                    lambda: chunks.scan("identity", "other"),
                    {number},
                )
                assert (number in hot) == (bool(best) and best[0][0] >= pursuit.SURVEY.first)
    assert len(hot) == 3


def made(path: str, lora: int, *parents: tuple[str, int]) -> Trace:
    return Trace(path, lora, [Parent(p, k, "sum", 0.5, 0.0, 0.5, 0.5, 0.5) for p, k in parents])


def test_a_circle_is_never_closed() -> None:
    known = survey.Descent()
    traces = [
        known.joined(made("a", 1, ("b", 2), ("d", 4))),
        known.joined(made("b", 2, ("c", 3))),
        known.joined(made("c", 3, ("a", 1))),
    ]
    assert [[p.path for p in t.parents] for t in traces] == [["b", "d"], ["c"], []]
    assert [row["path"] for row in traces[2].likely] == ["a"]
    assert known.joined(made("e", 5, ("e", 5))).parents == []
    lines = [(line.path, line.depth) for line in tree(traces)]
    assert lines == [("c", 0), ("b", 1), ("a", 2), ("d", 0), ("a", 1)]
    assert sum("->" in line for line in dot(traces)) == 3


#: The first merge is given, in the second it is interrupted.
SLOW = """
import sys, time
from lorafind.trace import survey
from lorafind.__main__ import main
real, merges = survey.of_lora, []
def slow(*rest):
    found = real(*rest)
    merges.extend(found.parents[:1])
    if len(merges) == 2:
        print("second", file=sys.stderr, flush=True)
        time.sleep(60)
    return found
survey.of_lora = slow
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent otherwise there")
@pytest.mark.parametrize("form", ["--json", "--dot", "--tsv"])
def test_interrupted_it_gives_what_it_has(tmp_path: Path, form: str) -> None:
    few = dict(list(SHAPES.items())[:8])
    loras = [trained(few, 4, seed=k, alpha=2.0) for k in range(4)]
    for k, modules in enumerate(loras):
        write(tmp_path / "l" / f"p{k}.safetensors", modules)
    for k, name in enumerate("xy"):
        merged = concatenated(loras[2 * k : 2 * k + 2], [0.7, 0.4], torch.half)
        write(tmp_path / "l" / f"{name}.safetensors", merged)
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([tmp_path / "l"], device="cpu")
    arguments = ["--db", str(tmp_path / "x.db"), "trace", "--all", form]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    told = ""
    while "second" not in told:
        line = running.stderr.readline()
        assert line, told
        told += line
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "this is what was found until then" in stderr
    if form == "--json":
        (one,) = [one for one in json.loads(stdout) if one["parents"]]
        assert len(one["parents"]) == 2
    elif form == "--dot":
        assert stdout.endswith("}\n") and stdout.count("->") == 2
    else:
        assert len(stdout.splitlines()) == 2


def test_a_long_run_is_estimated_first(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, sentence: str) -> None:
            notes.append(sentence)

    monkeypatch.setattr(survey, "TRIAL", 0.0)
    monkeypatch.setattr(survey, "LONG", 0.0)
    with Index.open(collection / "x.db") as index:
        list(index.trace_all(Notes()))
    (said,) = [note for note in notes if "will take about" in note]
    assert "an estimate from the first 1" in said and said.startswith("The other 2 LoRAs")
