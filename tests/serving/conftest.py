"""One base and bank for all tests of answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bank.samples import same_bits
from serving.small import Small, make

from trace_dist import Router


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def base_is_kept(router: Router) -> Iterator[None]:
    """Whatever a test does, its file's router holds the base afterwards, bit for bit."""
    before = {name: value.clone() for name, value in router.model.module.state_dict().items()}
    yield
    assert same_bits(before, router.model.module.state_dict(), "float32")
    assert router.holds_base()
