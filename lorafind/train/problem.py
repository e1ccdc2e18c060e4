"""What goes wrong with a training, told to people."""

from __future__ import annotations


class TrainProblem(Exception):
    """One sentence that says what is wrong with pictures, model or settings, and what to do."""
