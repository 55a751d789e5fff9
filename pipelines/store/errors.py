"""Errors of the store, importable without MLflow, which takes seconds to import."""


class LostResultError(Exception):
    """The artifacts of a finished stage are missing or were altered."""
