"""What can be wrong with a plan or a log, in one sentence that says what to do."""

from lorafind.index.problem import IndexProblem


class CleanProblem(IndexProblem):
    """A plan or an undo log cannot be used as asked; the message is one sentence for the user."""
