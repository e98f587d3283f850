"""The tiny corpus of the training tests, and the processes of the parallel ones."""

from tests.parallel.conftest import pool
from tests.training.conftest import corpus

__all__ = ["corpus", "pool"]
