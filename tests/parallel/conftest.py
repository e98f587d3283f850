"""Pools of ranks for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool_of_16() -> Iterator[Pool]:
    pool = Pool(16)
    yield pool
    pool.close()
