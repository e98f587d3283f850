"""`megakrause evaluate`: a checkpoint's loss on a held-out corpus, without an engine."""

from __future__ import annotations

import torch

from megakrause.batch import TokenBatch
from megakrause.checkpoint.model import load_model, stored_config, stored_tokenizer
from megakrause.checkpoint.read import find_checkpoint
from megakrause.data.loader import eval_batches, num_eval_batches
from megakrause.data.open import eval_windows
from megakrause.errors import UserError
from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.mesh import Mesh
from megakrause.training.evaluate import Evaluation, evaluate

TOKENS_AT_ONCE = 4096


@torch.no_grad()
def evaluate_checkpoint(path: str, prefix: str | None) -> Evaluation:
    """The loss of CHECKPOINT on the corpus PREFIX, or on its config's data.valid. Raises UserError."""
    checkpoint = find_checkpoint(path)
    config = stored_config(checkpoint)
    prefix = prefix or config.data.valid
    if prefix is None:
        raise UserError(f"{checkpoint.path} names no data.valid; give --data PREFIX")
    tokenizer = stored_tokenizer(checkpoint)
    windows = eval_windows(config, tokenizer, prefix)
    assert windows is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, device)
    batch = max(1, TOKENS_AT_ONCE // config.train.seq_len)

    def loss_sum(batch: TokenBatch) -> tuple[float, int]:
        batch = batch.to(device)
        logits = model(batch.tokens, batch.doc_start)
        return float(cross_entropy_sum(logits, batch.targets, batch.loss_mask)), int(batch.loss_mask.sum())

    batches = eval_batches(windows, batch=batch, rank=0, ranks=1, limit=0)
    total = num_eval_batches(windows, batch=batch, ranks=1, limit=0)
    return evaluate(loss_sum, batches, Mesh.alone(device), windows.corpus.bytes_per_token, total)
