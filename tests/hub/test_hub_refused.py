"""What the Hub, the network or the disk may do to a download, and what is then said."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorafind.bases.problem import BasisProblem
from lorafind.hub import names as hub
from lorafind.index.progress import Progress, Silent
from tests.hub.hub_net import NAME, STORAGE, Net
from tests.hub.hub_server import READER, Fault, Repository
from tests.hub.made_basis import spoiled
from tests.unprivileged import needs_permissions, open_folder, unprivileged


def swapped(net: Net, data: bytes) -> None:
    net.server.swapped[hashlib.sha256(net.data).hexdigest()] = data


@pytest.mark.parametrize("change", ["other", "longer"])
def test_other_bytes_than_stated_are_not_kept(net: Net, alone: Path, change: str) -> None:
    wrong = net.data[:-1] + b"\x01" if change == "other" else net.data + b"more"
    swapped(net, wrong)
    said = net.refused()
    digest = hashlib.sha256(net.data).hexdigest()
    assert said.startswith(f"hf:{NAME}@{net.commit} came with other bytes than the Hub states")
    assert f"not {digest}): nothing was kept." in said
    assert not list(alone.rglob("*.incomplete"))
    net.server.swapped.clear()
    assert net.resolve().path.read_bytes() == net.data


def test_fewer_bytes_than_stated_are_no_basis(net: Net) -> None:
    swapped(net, net.data[:1000])
    assert net.refused().startswith(f"The connection to {net.host} was cut (it ended too early)")


def test_a_basis_that_fails_its_self_test_is_not_kept(net: Net, alone: Path) -> None:
    data = spoiled(net.data)
    commit = net.server.repositories[NAME].commit({"basis.safetensors": data})
    said = net.refused()
    assert said.startswith(
        f"hf:{NAME}@{commit} came as it was published, but cannot be used, and was not kept: "
        "basis.safetensors fails its self-test"
    )
    assert not [p for p in alone.rglob("*") if p.is_file() and p.stat().st_size > 10_000]


def test_a_damaged_copy_in_the_cache_is_fetched_again(net: Net) -> None:
    found = net.resolve()
    blob = found.path.resolve()
    blob.write_bytes(net.data[:-1] + b"\x01")
    with pytest.raises(BasisProblem, match=r"^The copy of hf:alice/wild in the cache .* damaged"):
        net.resolve(offline=True)
    assert net.resolve(found.name).path.read_bytes() == net.data


def test_a_basis_without_a_stated_digest_is_refused(net: Net) -> None:
    sentence = (
        f"{net.host} states no SHA-256 for basis.safetensors of hf:{NAME}@{net.commit}, so that "
        "it cannot be checked: it has to be published with Git LFS, as `lorafind basis push` does."
    )
    # The digest names a file of the cache: nothing else may pass for one.
    net.server.digests["basis.safetensors"] = "../../../../escaped"
    assert net.refused() == sentence
    net.server.large = (".png",)
    assert net.refused() == sentence
    assert not net.server.asked("/resolve/")


def test_no_room_is_said_before_anything_is_fetched(net: Net) -> None:
    net.server.sizes["basis.safetensors"] = 1 << 60
    said = net.refused()
    assert said.startswith("The disk has no room for this basis: it needs 1152921504606.8 MB in ")
    assert not net.served


@needs_permissions
def test_a_cache_that_may_only_be_read(
    net: Net, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_folder() as folder:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        (folder / "cache").mkdir(mode=0o555)
        with unprivileged():
            said = net.refused()
        assert said.startswith(f"{folder}/cache/")
        assert said.endswith(" may not be written: set HF_HOME to a folder of yours.")
        (folder / "cache").chmod(0o755)
        found = net.resolve()
        with unprivileged():
            assert net.resolve() == net.resolve(found.name) == found


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(["mount", *options]).returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_runs_full_on_the_way(net: Net, alone: Path) -> None:
    @dataclass
    class Greedy(Silent):
        """Another program takes the disk when the download begins."""

        file: Path

        def stage(self, title: str, files: int, size: int) -> None:
            self.file.write_bytes(bytes(1_200_000))

    with small_disk(alone, "2m"):
        filler = alone / "filler"
        watch: Progress = Greedy(filler)
        said = net.refused(watch=watch)
        assert said == (
            "The disk is full: free some space and run the same command again, it goes on where "
            "it was."
        )
        filler.unlink()
        assert net.resolve().path.read_bytes() == net.data
        assert net.server.asked(STORAGE)[-1].range


def test_what_is_not_there(net: Net) -> None:
    host = net.host
    assert net.refused(f"hf:{NAME}@v2") == (
        f"{NAME} on {host} has no revision v2: check the part after @."
    )
    assert net.refused("hf:alice/none", token=READER) == (
        f"There is no repository alice/none on {host} (or it is private and the token may not see "
        "it): check the name."
    )
    net.server.repositories["alice/empty"] = Repository()
    commit = net.server.repositories["alice/empty"].commit({"README.md": b""})
    assert net.refused("hf:alice/empty") == (
        f"hf:alice/empty@{commit} on {host} holds no basis.safetensors: it is no basis of lorafind."
    )


def test_a_private_basis(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    net.server.repositories[NAME].private = True
    host = net.host
    assert net.refused() == (
        f"{host} shows no repository {NAME}: the name is wrong, or it is private; for a private "
        "one set HF_TOKEN or run `hf auth login`."
    )
    assert net.refused(token="hf_wrong") == (
        f"{host} does not accept the token for {NAME} (Invalid credentials in Authorization "
        "header): make a new one."
    )
    for torn in ("hf reads", "hf_reads\n", "hf_é"):
        said = net.refused(token=torn)
        assert said == "The token has characters that no token has: copy it once more."
    monkeypatch.setenv("HF_TOKEN", READER)
    net.server.requests.clear()
    assert net.resolve().path.read_bytes() == net.data
    # The token is for the Hub; the storage behind it must not learn it.
    assert {r.token for r in net.server.asked("/(api|resolve)/")} == {READER}
    assert {r.token for r in net.server.asked(STORAGE)} == {""}


API = f"GET /api/models/{NAME}"


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (401, {}, "{host} shows no repository alice/wild: the name is wrong, or it is private;"),
        (
            403,
            {"X-Error-Message": "Your IP is blocked"},
            "{host} does not let you read alice/wild (Your IP is blocked): use a token with that "
            "right.",
        ),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            "alice/wild is open only to whom its owner admits: ask for access at "
            "{host}/alice/wild, then set HF_TOKEN or run `hf auth login`.",
        ),
        (404, {}, "There is no repository alice/wild on {host} (or it is private; then set "),
        (
            429,
            {"Retry-After": "37"},
            "{host} has had too many requests from here (429): try again in 37 seconds.",
        ),
        (
            429,
            {"RateLimit": '"api";r=0;t=55'},
            "{host} has had too many requests from here (429): try again in 55 seconds.",
        ),
        (
            429,
            {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"},
            "{host} has had too many requests from here (429): try again after Wed, 21 Oct 2026 "
            "07:28:00 GMT.",
        ),
        (429, {}, "{host} has had too many requests from here (429): try again in a few minutes."),
        (500, {}, "{host} is out of order (500): try again in a while."),
        (503, {}, "{host} is out of order (503): try again in a while."),
        (418, {}, "{host} refuses what was asked of alice/wild (418)."),
        (
            200,
            {},
            "What answered is not the Hub, or a proxy stands in between: check the connection and "
            "HF_ENDPOINT.",
        ),
    ],
)
def test_answers_of_the_hub(net: Net, status: int, headers: dict[str, str], sentence: str) -> None:
    body = b"<html>Sign in to the hotel</html>"
    kind = {"Content-Type": "text/html", "Content-Length": str(len(body))}
    net.server.faults.append(Fault(API, status=status, headers={**kind, **headers}, body=body))
    expected = sentence.format(host=net.host)
    assert net.refused().startswith(expected)


@pytest.mark.parametrize("status", [403, 404, 429, 500])
def test_answers_of_the_storage(net: Net, status: int) -> None:
    headers = {"Retry-After": "5"} if status == 429 else {}
    net.server.faults.append(Fault(STORAGE, status=status, headers=headers))
    said = net.refused()
    assert {
        403: "does not let you read",
        404: "There is no repository",
        429: "in 5 seconds",
        500: "is out of order (500)",
    }[status] in said


def test_nobody_listens_and_the_cache_that_would_do(net: Net) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(BasisProblem) as problem:
        hub.resolve(f"hf:{NAME}", endpoint=f"http://{host}")
    said = str(problem.value)
    assert said.startswith(f"{host} cannot be reached (")
    assert said.endswith("): check the connection and HF_ENDPOINT.")
    pinned = net.resolve().name
    with pytest.raises(BasisProblem) as problem:
        hub.resolve(f"hf:{NAME}", endpoint=f"http://{host}")
    assert str(problem.value) == f"{said} Or use what the cache has, {pinned}."
    assert hub.resolve(pinned, endpoint=f"http://{host}").name == pinned


def test_a_hub_that_does_not_answer(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(BasisProblem, match=rf"^{host} does not answer"):
            hub.resolve(f"hf:{NAME}", endpoint=f"http://{host}")


def test_a_connection_that_breaks_before_the_answer(net: Net) -> None:
    net.server.faults.append(Fault(API, after=10))
    assert net.refused().startswith(f"The connection to {net.host} was cut (")
