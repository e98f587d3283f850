"""Places with one good checkpoint, and a nursery for processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megakrause.checkpoint import place
from tests.checkpoint.processes import Nursery
from tests.checkpoint.states import Home, save
from tests.checkpoint.stores import Store, quick


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are given up soon, and none fails but as a test says."""
    monkeypatch.setattr(place, "Patience", quick)
    monkeypatch.setattr(Store, "fault", None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one good checkpoint, of step 1."""
    save(tmp_path / "checkpoints", 1)
    return tmp_path / "checkpoints"


@pytest.fixture(params=["", "file://"], ids=["folder", "url"])
def home(root: Path, request: pytest.FixtureRequest) -> Home:
    """The same, called by its path and by a URL."""
    return Home(root, request.param)
