"""The registry's default in an index: fetched, used where it serves, never against the user."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import lorafind
from lorafind.bases.basis import OWN
from lorafind.bases.default import take
from lorafind.bases.file import read_facts
from lorafind.bases.stored import in_use
from lorafind.bases.use import Used
from lorafind.hub import registry
from lorafind.hub.registry import Entry
from lorafind.index.progress import Silent
from lorafind.index.store import Store
from tests.e2e import tools
from tests.hub.hub_net import NAME
from tests.hub.hub_server import HubServer, Repository, hub_server

DATA = Path(lorafind.__file__).parent / "demo/data"


class Notes(Silent):
    """Sentences that a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An index of the demo, and a basis of its own styles as a file."""
    folder = tmp_path_factory.mktemp("default")
    for world in ("thin", "wild"):
        shutil.copytree(DATA / world, folder / world)
    tools.index(folder / "i.db", folder / "thin", folder / "wild")
    out = folder / "b.safetensors"
    tools.rows(
        tools.lorafind("rebuild-basis", "--from-index", "-o", out, "--json", db=folder / "i.db")
    )
    return folder / "i.db", out


def demo(file: Path) -> str:
    """The architecture of the demo's little model."""
    return str(read_facts(file)["architecture"])


def recommend(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, file: Path, sha256: str | None = None
) -> None:
    """A registry with one entry for the demo's model, on a Hub of this machine."""
    repository = server.repositories[NAME] = Repository()
    config = b'{"architecture": "sd1", "feature": "style", "signature_version": 1}'
    commit = repository.commit({"basis.safetensors": file.read_bytes(), "config.json": config})
    digest = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    entry = Entry(demo(file), "style", NAME, commit, digest)
    monkeypatch.setattr(registry, "entries", lambda: (entry,))
    # Made from the endpoint when huggingface_hub is imported.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)


def taken(db: Path) -> tuple[str | None, list[str]]:
    """What is in use after :func:`take`, and what it told."""
    watch = Notes()
    with Store.open(db, "write") as store:
        ((architecture,),) = store.conn.execute("SELECT DISTINCT architecture FROM loras")
        take(store, architecture, watch)
        return store.get_meta(in_use(architecture)), watch.said


@pytest.fixture
def db(collection: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(collection[0], tmp_path / "i.db"))


def test_it_is_taken_where_it_serves_and_not_asked_for_again(
    alone: Path, db: Path, collection: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert taken(db) == (None, [])  # Nothing is recommended, nothing is fetched.
    with hub_server() as server:
        recommend(monkeypatch, server, collection[1])
        chosen, said = taken(db)
        assert chosen not in (None, OWN)
        assert len(said) == 1 and f"({chosen}), which lorafind recommends for other:" in said[0]
        server.requests.clear()
        assert taken(db) == (chosen, [])
        assert not server.requests
    with lorafind.Index.open(db) as index:
        target = str(next(DATA.glob("wild/*.safetensors")))
        assert {row.basis for row in index.similar(target)} == {chosen}


def test_a_choice_of_the_user_stays(
    alone: Path, db: Path, collection: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with lorafind.Index.open(db, write=True) as index:
        index.use_basis(str(collection[1]))
        index.use_basis(OWN)
    with hub_server() as server:
        recommend(monkeypatch, server, collection[1])
        assert taken(db) == (OWN, [])
        assert not server.requests


def test_what_cannot_be_had_or_does_not_fit_is_told(
    alone: Path, db: Path, collection: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server() as server:
        recommend(monkeypatch, server, collection[1], sha256="0" * 64)
        chosen, said = taken(db)
        assert chosen is None
        assert len(said) == 1 and "holds other bytes" in said[0]


def test_one_that_does_not_know_the_styles_gives_way_to_the_collections_own(
    alone: Path, db: Path, collection: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafind.bases.use.KEEPS", 9.0)
    with hub_server() as server:
        recommend(monkeypatch, server, collection[1])
        assert taken(db) == (OWN, [])
        server.requests.clear()
        assert taken(db) == (OWN, [])
        assert not server.requests


def test_when_a_basis_serves() -> None:
    def serves(kept: float | None, own: float | None) -> bool | None:
        return Used("1", "a", "sd1", 9, kept=kept, own_kept=own).serves

    assert serves(None, 0.9) is None
    assert serves(0.95, None) is True
    assert serves(0.89, None) is False
    assert serves(0.95, 1.04) is True
    assert serves(0.95, 1.06) is False
