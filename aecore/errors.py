"""How a run can end badly through no fault of the code."""


class InputError(ValueError):
    """Bad configuration or bad data. The message is one line: what, where, and how to mend it."""


class DivergenceError(ArithmeticError):
    """A loss term stopped being finite. The message names the term and the epoch."""


class OutageError(Exception):
    """Something outside, such as MLflow, does not answer. One line: what, what is kept, and how to go on."""


class TakenOverError(Exception):
    """Another process has this job now; what it does counts."""
