"""What goes wrong with a basis, told to people."""

from __future__ import annotations


class BasisProblem(Exception):
    """One sentence that says what is wrong with a basis or a labelled folder, and what to do."""
