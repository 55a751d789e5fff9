"""Threads in which measures are taken side by side."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import ParamSpec, TypeVar

import torch

from aecore.core.imports import fast_imports

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Computes functions of NumPy and scikit-learn in threads.

    Torch has as many threads of its own, so the caller does no work with torch while these compute: where threads are
    more than processors, those of torch's OpenMP wait for each other many times as long as they compute.
    """

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Start a function, which itself must not wait for another one, and return a function that waits for its
        result. Without threads, the first who asks for the result computes it."""
        if self._pool is None:
            return cache(partial(function, *args, **kwargs))
        return self._pool.submit(function, *args, **kwargs).result


@contextmanager
def side_by_side(*modules: str) -> Iterator[Threads]:
    """Yield as many threads as torch uses, and none if torch uses one.

    Each thread computes alone, without further threads of BLAS and OpenMP, so that numbers do not depend on how many
    there are.

    Args:
        modules: what the threads use. It is imported here, since two threads that import scikit-learn at once may find
            modules half made, and since the limit of threads holds for the libraries that are loaded.
    """
    from threadpoolctl import threadpool_limits

    with fast_imports():
        for name in modules:
            importlib.import_module(name)
    count, alone = torch.get_num_threads(), partial(threadpool_limits, 1, "openmp")
    # BLAS has one limit for all threads. scikit-learn sets it now and then, and restores the limit before it: that has
    # to be the same at any time. OpenMP has a limit for each thread
    with threadpool_limits(1, "blas"):
        if count == 1:
            with alone():
                yield Threads(None)
        else:
            with ThreadPoolExecutor(count, initializer=alone) as pool:
                yield Threads(pool)
