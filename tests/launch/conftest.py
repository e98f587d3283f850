"""The tiny corpus of the training tests."""

from tests.training.conftest import config, corpus

__all__ = ["config", "corpus"]
