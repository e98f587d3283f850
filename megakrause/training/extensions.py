"""DeepSpeed's compiled extensions: this project uses none of them, so none is ever built.

With an optimizer of the project's own (`zero_force_ds_cpu_optimizer = false` where states are offloaded), DeepSpeed
compiles a single extension by itself: on a CPU, every process group first loads `deepspeed_shm_comm`. Its one operation
serves tensor-parallel inference; training never calls it. Building it takes most of a minute on first use and needs a
compiler and the Python headers, and a build that is killed leaves a lock for which every later run waits, silently.
"""

from __future__ import annotations

import os

import torch


def prepare_extensions() -> None:
    """Keep DeepSpeed from compiling anything. To be called before it makes a process group; again is harmless."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would search for one and warn that there is none
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Only the CPU's communication looks at this table; elsewhere filling it would probe for CUDA toolkits in vain.
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
