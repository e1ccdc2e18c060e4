"""Sizes, segments and versions of the signatures (without torch, so that queries can use them)."""

from __future__ import annotations

import numpy as np

#: Numbers per segment of the identity sketch and per group of the style sketch.
DIMENSIONS = 128
STYLE = 32_768
#: Identity segments, in stored order.
SEGMENTS = (
    "self/early",
    "self/late",
    "cross/early",
    "cross/late",
    "ff/early",
    "ff/late",
    "conv+other/early",
    "conv+other/late",
    "te1",
    "te2",
    "te",
)
#: ‖ΔW‖² from which on a module's numbers are no weights; float32 still holds the square of this.
TOO_LARGE = 2.0**62
#: A module below this share of its group's median norm loses its vote in proportion.
FAINT = 0.01
#: Version of names, families and detection: files that another one has read are read again.
READER_VERSION = 2
#: Version of signs, folds and formulas: signatures of another one are never compared.
SIGNATURE_VERSION = 1

#: What a row of the index's ``files`` must carry to hold.
VERSION = READER_VERSION * 1000 + SIGNATURE_VERSION
#: One row of the index's ``identity`` series: the exact norm ‖ΔW‖ of every segment, and the
#: sketches of the segments, each over its norm.
IDENTITY = np.dtype(
    [("norms", "<f8", (len(SEGMENTS),)), ("sketch", "<f2", (len(SEGMENTS), DIMENSIONS))]
)
