"""`megakrause evaluate`: a checkpoint's loss on a held-out corpus, and what else is said of it, without an engine."""

from __future__ import annotations

import torch

from megakrause.batch import Batch
from megakrause.checkpoint.model import load_model, stored_config, stored_tokenizer
from megakrause.checkpoint.read import find_checkpoint
from megakrause.data.images import ImageSamples
from megakrause.data.loader import eval_batches, num_eval_batches
from megakrause.data.open import eval_images, eval_windows
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from megakrause.models.objective import build_objective
from megakrause.parallel.mesh import Mesh
from megakrause.training.evaluate import Evaluation, evaluate

TOKENS_AT_ONCE = 4096
VALUES_AT_ONCE = 1 << 16  # of images, or patches


@torch.no_grad()
def evaluate_checkpoint(path: str, prefix: str | None) -> Evaluation:
    """The loss of CHECKPOINT on the corpus PREFIX, or on its config's data.valid. Raises UserError."""
    checkpoint = find_checkpoint(path)
    config = stored_config(checkpoint)
    prefix = prefix or config.data.valid
    if prefix is None:
        raise UserError(f"{checkpoint.path} names no data.valid; give --data PREFIX")
    valid: TokenWindows | ImageSamples | None
    if config.model.kind == "lm":
        valid = eval_windows(config, stored_tokenizer(checkpoint), prefix)
    else:
        valid = eval_images(config, prefix)
    assert valid is not None
    if isinstance(valid, ImageSamples) and config.model.classes is not None and "classes" in checkpoint.state:
        valid.check_classes(checkpoint.state["classes"], checkpoint.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, device)
    objective, images = build_objective(model.config), isinstance(valid, ImageSamples)
    size = max(1, (VALUES_AT_ONCE if images else TOKENS_AT_ONCE) // config.seq_len)

    def sums(batch: Batch) -> tuple[list[float], int]:
        batch = batch.to(device)
        values = objective.sums(model(*batch.inputs), batch.targets, batch.loss_mask)
        return values.tolist(), int(batch.loss_mask.sum())

    batches = eval_batches(valid, batch=size, rank=0, ranks=1, limit=0, prefetch=2 if images else 0)
    total = num_eval_batches(valid, batch=size, ranks=1, limit=0)
    bytes_per_token = valid.corpus.bytes_per_token if isinstance(valid, TokenWindows) else None
    return evaluate(sums, batches, Mesh.alone(device), model.config, bytes_per_token, total)
