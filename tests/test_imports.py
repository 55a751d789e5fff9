import gc

import pytest

from aecore.core.imports import fast_imports


def test_garbage_is_collected_again_after_imports_whatever_happens() -> None:
    with pytest.raises(ImportError), fast_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_imports_within_imports_leave_it_to_the_outer_ones() -> None:
    with fast_imports():
        with fast_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
