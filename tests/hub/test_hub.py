"""Bases by name and from the Hub, through the real client, against a real server."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorafind.bases.problem import BasisProblem
from lorafind.hub import cache, registry
from lorafind.hub import names as hub
from lorafind.hub.address import Address, Found, parse
from lorafind.hub.client import Hub
from lorafind.hub.registry import Entry
from tests.hub.hub_net import NAME, STORAGE, Counted, Net
from tests.hub.hub_server import Fault, Repository, hub_server
from tests.hub.made_basis import write_basis


def test_a_basis_is_fetched_pinned_and_nothing_else_is(net: Net, alone: Path) -> None:
    found = net.resolve()
    assert found.name == f"hf:{NAME}@{net.commit}"
    assert found.path.read_bytes() == net.data
    assert found.path.is_relative_to(alone)
    assert net.served == len(net.data)
    fetched = {request.path.rpartition("/")[2] for request in net.server.asked("/resolve/")}
    assert fetched == {"basis.safetensors", "config.json"}
    # Every file was asked for by the commit, whatever the branch has become since.
    assert all(f"/resolve/{net.commit}/" in r.path for r in net.server.asked("/resolve/"))
    assert not list(alone.rglob("*.incomplete"))


def test_what_is_pinned_and_cached_needs_no_connection(net: Net) -> None:
    first = net.resolve()
    net.server.requests.clear()
    assert net.resolve(first.name) == first
    assert net.resolve(f"hf:{NAME}@{net.commit[:9]}", offline=True) == first
    assert not net.server.requests
    # A branch may have moved: it is asked for, but its bytes are here.
    assert net.resolve() == first
    assert [r.path for r in net.server.requests] == [f"/api/models/{NAME}"]


def test_a_branch_that_moved_is_followed_and_the_commit_still_stands(
    net: Net, tmp_path: Path
) -> None:
    first = net.resolve()
    newer = write_basis(tmp_path / "newer.safetensors", seed=1)
    commit = net.server.repositories[NAME].commit({"basis.safetensors": newer.read_bytes()})
    assert net.resolve().name == f"hf:{NAME}@{commit}"
    assert net.resolve().path.read_bytes() == newer.read_bytes()
    assert net.resolve(first.name).path.read_bytes() == net.data


def test_offline_takes_a_branch_as_it_was(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    first = net.resolve()
    net.server.repositories[NAME].commit({"basis.safetensors": b"newer"})
    net.server.requests.clear()
    assert net.resolve(offline=True) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert net.resolve() == first
    with pytest.raises(BasisProblem, match=f"^The cache has {first.name} but not hf:{NAME}@other,"):
        net.resolve(f"hf:{NAME}@other")
    assert not net.server.requests


def test_offline_without_cache(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = (
        f"hf:{NAME} is not in the cache, and nothing is fetched offline: "
        f"`lorafind basis pull hf:{NAME}` when there is a connection."
    )
    assert net.refused(offline=True) == sentence
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert net.refused() == sentence
    assert not net.server.requests


@pytest.mark.parametrize("hard", [False, True])
def test_a_cut_connection_is_taken_up_where_it_broke(net: Net, hard: bool) -> None:
    net.server.faults += [Fault(STORAGE, 1, after=200_000, hard=hard) for _ in range(2)]
    assert net.resolve().path.read_bytes() == net.data
    parts = net.server.asked(STORAGE)
    assert len(parts) == 3
    begins = [int(r.range.removeprefix("bytes=").rstrip("-") or 0) for r in parts]
    if hard:
        # A reset throws away what was on its way.
        assert begins[2] > 0 and begins == sorted(begins)
    else:
        assert begins == [0, 200_000, 400_000]
        assert net.served == len(net.data)


def test_the_next_run_goes_on_where_the_last_was_cut(net: Net, alone: Path) -> None:
    net.server.faults.append(Fault(STORAGE, 1, after=400_000))
    net.server.faults.append(Fault(STORAGE, after=0))
    said = net.refused()
    assert said.startswith(f"The connection to {net.host} was cut (")
    assert said.endswith("): run the same command again.")
    assert [path.stat().st_size for path in alone.rglob("*.incomplete")] == [400_000]
    net.server.faults.clear()
    assert net.resolve().path.read_bytes() == net.data
    assert net.server.asked(STORAGE)[-1].range == "bytes=400000-"
    assert net.served == len(net.data)
    assert not list(alone.rglob("*.incomplete"))


def test_patience_begins_anew_with_every_byte_that_comes(net: Net) -> None:
    for after in (0, 0, 10_000, 0, 0, 10_000, 0, 0):
        net.server.faults.append(Fault(STORAGE, 1, after=after))
    assert net.resolve().path.read_bytes() == net.data
    assert net.served == len(net.data)


def test_a_storage_that_cannot_begin_in_the_middle(net: Net) -> None:
    net.server.ranges = False
    net.server.faults.append(Fault(STORAGE, 1, after=400_000))
    assert net.resolve().path.read_bytes() == net.data
    assert net.served == 400_000 + len(net.data)


def test_a_storage_that_is_out_of_order_for_a_moment(net: Net) -> None:
    net.server.faults.append(Fault(STORAGE, 2, status=503))
    assert net.resolve().path.read_bytes() == net.data


def test_a_cache_without_links_holds_the_bytes_once(
    net: Net, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    found = net.resolve()
    assert not found.path.is_symlink() and found.path.read_bytes() == net.data
    assert [p for p in alone.rglob("*") if p.is_file() and p.stat().st_size == len(net.data)] == [
        found.path
    ]
    assert net.resolve(offline=True) == net.resolve() == found
    assert net.served == len(net.data)


def test_two_at_a_time_fetch_it_once(net: Net) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(net.resolve, [f"hf:{NAME}"] * 2)
    assert first == second
    assert net.served == len(net.data)


def test_progress_is_told_in_mebibytes(alone: Path, tmp_path: Path) -> None:
    data = write_basis(tmp_path / "large.safetensors", width=300_000).read_bytes()
    watch = Counted()
    with hub_server() as server:
        repository = server.repositories[NAME] = Repository()
        repository.commit({"basis.safetensors": data})
        hub.resolve(f"hf:{NAME}", endpoint=server.url, watch=watch)
    assert watch.stages == [("Downloading, MiB", -(-len(data) // 2**20), 0)]
    assert watch.done == len(data) // 2**20


def test_names_of_repositories() -> None:
    assert parse("hf:a/b") == Address("a/b")
    assert parse("hf:a/b@refs/pr/1") == Address("a/b", "refs/pr/1")
    assert str(parse("hf:a-1/b.c@v1.0")) == "hf:a-1/b.c@v1.0"
    assert parse(f"hf:a/b@{'0' * 40}").pinned
    assert not parse("hf:a/b@main").pinned
    for wrong in ("hf:a", "hf:a/b/c", "hf:a/b@", "hf:a/b@../x", "hf:../b", "hf:a/b c", "hf:a/é"):
        with pytest.raises(BasisProblem, match="names no repository: write hf:owner/name"):
            parse(wrong)


def test_names_of_the_folder(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bases"
    folder.mkdir()
    one = write_basis(folder / "fonts.safetensors", seed=1, name="mine")
    two = write_basis(folder / "faces.safetensors", seed=2, name="yours")
    (folder / "torn.safetensors").write_bytes(b"x")
    for name in ("fonts", "fonts.safetensors", "mine", "00000001", str(one)):
        assert hub.resolve(name) == Found(one, name if name == str(one) else str(one))
    write_basis(two, seed=3, name="mine")
    refused = {
        "mine": f"2 bases in {folder} are called mine: name one by its file, faces or fonts.",
        "fonds": "There is no basis fonds. Did you mean fonts?",
        "alice/wild": "There is no basis alice/wild. On the Hub it would be hf:alice/wild.",
        "x/y/z": "There is no basis x/y/z. `lorafind basis list` shows those that are here.",
        "no.safetensors": f"There is no basis file no.safetensors, neither there nor in {folder}.",
    }
    for name, sentence in refused.items():
        with pytest.raises(BasisProblem) as problem:
            hub.resolve(name)
        assert str(problem.value) == sentence


def test_the_registry_pins_bytes(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(net.data).hexdigest()
    entry = Entry("sd1", "style", NAME, net.commit, digest)
    monkeypatch.setattr(registry, "entries", lambda: (entry,))
    assert registry.default("sd1") == entry
    assert registry.default("sdxl") is None
    assert net.resolve("wild") == net.resolve(NAME)
    assert net.resolve("wild").name == f"hf:{NAME}@{net.commit}"
    # The same commit with other bytes: the Hub is not believed.
    cache.drop(net.resolve("wild").path)
    forged = replace(entry, sha256="0" * 64)
    monkeypatch.setattr(registry, "entries", lambda: (forged,))
    assert net.refused("wild") == (
        f"hf:{NAME}@{net.commit} holds other bytes (SHA-256 {digest}) than lorafind knows of it "
        f"({'0' * 64}): it is not used. Update lorafind."
    )
    assert len(net.server.asked(STORAGE)) == 1


def test_the_registry_that_is_shipped_names_commits_and_digests() -> None:
    for entry in registry.entries():
        assert Address(entry.repository, entry.revision).pinned
        assert len(bytes.fromhex(entry.sha256)) == 32


def test_facts_without_the_basis(net: Net) -> None:
    facts, pinned, path = Hub(net.server.url).facts(Address(NAME))
    assert facts == {"architecture": "sd1", "feature": "style", "signature_version": 1}
    assert (str(pinned), path) == (f"hf:{NAME}@{net.commit}", None)
    assert not net.served
    net.server.requests.clear()
    assert Hub(net.server.url).facts(pinned)[0] == facts
    assert not net.server.requests
    found = net.resolve()
    facts, _, path = Hub(net.server.url, offline=True).facts(Address(NAME))
    assert (facts["scales"], path) == ([1.0, 1.25, 1.5], found.path)


@pytest.mark.parametrize(
    "text", [b"[]", b"{", b"{}", b"\xff", b'{"architecture": 1, "feature": 1, "evaluation": 3}']
)
def test_facts_that_are_none(net: Net, text: bytes) -> None:
    net.server.repositories[NAME].commit({"config.json": text})
    with pytest.raises(BasisProblem, match=r"config\.json does not hold the facts of a basis\.$"):
        Hub(net.server.url).facts(Address(NAME))
