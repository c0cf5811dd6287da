"""What tests of studies share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from studies.small import Setup, make_setup

from trace_dist.utils import locks


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    yield make_setup(tmp_path_factory.mktemp("study"))
    locks.release()
