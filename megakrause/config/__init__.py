"""The typed description of a run, checked before anything starts: every key, its meaning, default and legal values.

What was resolved is written back with `RunConfig.to_toml()` and restarts the run by itself.
"""

from megakrause.config.data import AugmentConfig, DataConfig, SourceConfig
from megakrause.config.model import AttentionKind, CoreKind, LoraConfig, ModelConfig, ModelKind, RopeScaling
from megakrause.config.run import (
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megakrause.config.section import Section

__all__ = [
    "AttentionKind",
    "AugmentConfig",
    "CheckpointConfig",
    "CoreKind",
    "DataConfig",
    "GuardConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelKind",
    "OptimConfig",
    "ParallelConfig",
    "RopeScaling",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TrainConfig",
]
