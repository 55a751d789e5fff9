"""The two ways a run can end badly through no fault of the machine."""


class InputError(ValueError):
    """Bad configuration or bad data. The message is one line: what, where, and how to mend it."""


class DivergenceError(ArithmeticError):
    """A loss term stopped being finite. The message names the term and the epoch."""
