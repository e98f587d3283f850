"""The tiny corpus of the training tests."""

from tests.training.conftest import corpus

__all__ = ["corpus"]
