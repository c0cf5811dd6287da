"""One base and bank for all tests of answers."""

from __future__ import annotations

import pytest
from serving.small import Small, make


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make(tmp_path_factory.mktemp("small"))
