"""A query while a writer changes the basis."""

from __future__ import annotations

from pathlib import Path

import lorafind
from lorafind.index.store import Store
from lorafind.search.similar import Wishes
from tests.e2e import tools

DATA = Path(lorafind.__file__).parent / "demo/data"


def test_a_query_sees_one_basis_while_a_writer_drops_it(tmp_path: Path) -> None:
    db = tmp_path / "i.db"
    tools.index(db, DATA / "thin", DATA / "wild")
    target = str(next(iter(sorted((DATA / "wild").glob("*.safetensors")))))
    wishes = Wishes(count=5)
    with lorafind.Index.open(db) as index:
        before = [row.to_json() for row in index.similar(target, wishes)]
        dropped: list[str] = []

        def drop(statement: str) -> None:
            # The basis has been chosen, its embeddings are about to be read.
            if "FROM series" in statement and not dropped:
                dropped.append(statement)
                with Store.open(db, "write") as writer, writer.batch():
                    for basis in writer.basis_ids():
                        writer.drop_basis(basis)

        asked = index.ask(target)
        index.store.conn.set_trace_callback(drop)
        during = [row.to_json() for row in index.similar(asked, wishes)]
        index.store.conn.set_trace_callback(None)
        after = [row.to_json() for row in index.similar(asked, wishes)]
    assert dropped
    assert during == before
    assert {row["basis"] for row in after} == {"plain"}
