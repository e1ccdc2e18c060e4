"""An index as Arrow tables, which Parquet and LanceDB hold and any other tool can read.

Every table has the entry ``lorafind`` in the metadata of its schema: JSON with ``format`` (FORMAT),
``table`` and the ``version`` of lorafind that wrote it; in ``roots``, which is written last, also
``tables`` (table → rows) and what concerns the whole. Columns are those of ``index/schema.py``
under their names there; JSON stays text, times are nanoseconds since 1970, UTC. Ids hold within
one export. What differs:

roots       as in the index.
layouts     modules: the JSON text itself, [canonical name, group, o, n, vector, late] per module.
loras       norms: list<float32>, ‖ΔW_m‖² per module in the order of the layout; norm: float64,
            ‖ΔW‖.
files       name: the whole path as text, for people; path: its bytes below the root, which count.
            content: that of the LoRA.
signatures  lora; version; groups: bit mask over (self_attn, cross_attn, ff, conv, text, other);
            scales: list<float32>, votes: list<float64>, one per group present; style: binary, int8,
            32,768 per group present. A group's sketch is scale · style.
identity    lora; series (``sd`` or ``other``); norms: fixed_size_list<float64>[11], ‖ΔW‖ of every
            segment (``signatures/constants.py``); sketch: fixed_size_list<float16>[1408], 128 per
            segment, each segment over its norm.
relations   x, y: LoRA ids; the rest as in the index.
bases       published bases, one row per array: basis, architecture, version, facts, made_ns, name,
            dtype (JSON of numpy's descr), shape (JSON), data.
embeddings-<architecture>
            one row per LoRA that the basis in use of that architecture can tell anything about:
            lora; content; path: one of its paths as text; groups: bit mask; fitted: whether the
            basis was fitted to it; vector: fixed_size_list<float32>[k], of length 1 where LoRAs are
            compared by cosine. Metadata: ``basis`` (its id), ``basis_name``, ``architecture``,
            ``metric`` (``cosine`` or ``euclidean``). Made for searching by others; an import fits
            and embeds anew from the signatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lorafind.exchange.source import FileRow, LoraRow
from lorafind.signatures.constants import DIMENSIONS, SEGMENTS

if TYPE_CHECKING:
    import pyarrow as pa

#: Of the tables; a reader refuses those of a higher one.
FORMAT = 1
KEY = b"lorafind"
#: Tables in the order in which they are written; embeddings come before the last, without which
#: nothing is read.
TABLES = ("layouts", "loras", "files", "signatures", "identity", "relations", "bases", "roots")
EMBEDDINGS = "embeddings-"
#: Rows of a batch, which becomes a row group; LoRAs carry their norms.
ROWS = 16_384
LORAS = 4096


class Table(NamedTuple):
    """A table on its way out, with batches of its schema."""

    name: str
    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


class Tables(Protocol):
    """Where tables are read."""

    label: str

    def facts(self, name: str) -> dict[str, Any]:
        """The entry ``lorafind`` of a table's metadata. Raises IndexProblem without one."""

    def count(self, name: str) -> int:
        """The number of rows of a table."""

    def columns(self, name: str) -> list[str]:
        """The names of a table's columns."""

    def batches(
        self, name: str, size: int, between: tuple[int, int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """A table, at most ``size`` rows at a time; between: at least the LoRAs from … to …"""


@cache
def schemas() -> Mapping[str, pa.Schema]:
    """Table → columns, without embeddings. Raises ModuleNotFoundError without pyarrow."""
    import pyarrow as pa

    text, whole, blob = pa.string(), pa.int64(), pa.binary()
    kinds = {
        "layouts": {"id": whole, "digest": text, "architecture": text, "modules": text},
        "loras": dict.fromkeys(LoraRow._fields, text)
        | {"id": whole, "layout": whole, "version": whole, "norm": pa.float64()}
        | {"norms": pa.list_(pa.float32())},
        "files": dict.fromkeys(FileRow._fields, whole)
        | dict.fromkeys(("status", "reason", "sha256", "presence", "content", "name"), text)
        | {"path": blob, "probe": blob, "is_link": pa.bool_()},
        "signatures": dict.fromkeys(("lora", "version", "groups"), whole)
        | {"scales": pa.list_(pa.float32()), "votes": pa.list_(pa.float64()), "style": blob},
        "identity": {
            "lora": whole,
            "series": text,
            "norms": pa.list_(pa.float64(), len(SEGMENTS)),
            "sketch": pa.list_(pa.float16(), len(SEGMENTS) * DIMENSIONS),
        },
        "relations": dict.fromkeys(("x", "y", "version"), whole)
        | {"grade": text, "direction": whole, "steps": text, "numbers": text},
        "bases": {"basis": text, "architecture": text, "version": whole, "facts": text}
        | {"made_ns": whole, "name": text, "dtype": text, "shape": text, "data": pa.large_binary()},
        "roots": {"id": whole, "path": blob, "single": pa.bool_(), "device": whole}
        | {"filesystem": text, "seen_ns": whole, "offline": text},
    }
    return {name: pa.schema(list(columns.items())) for name, columns in kinds.items()}
