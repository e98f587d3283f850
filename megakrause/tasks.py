"""`megakrause evaluate --tasks`: tasks of lm-evaluation-harness on a checkpoint, by way of its export, or on a Hugging
Face folder, so that the scores are those of `lm_eval` on that folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megakrause.errors import UserError
from megakrause.hf.export import export, has_code, is_code_ours
from megakrause.table import table


def evaluate_tasks(
    path: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    trust_remote_code: bool = False,
    json_path: Path | None = None,
) -> str:
    """A table of the scores of PATH, a checkpoint, a run or a Hugging Face folder.

    include: a folder of task files besides the harness's own. shots: None for each task's own number. limit: examples
    of each task; None for all. batch: sequences at once. Raises UserError when the harness is not installed, for a task
    that it does not know or whose data cannot be read, and for a folder with code of its own that is not trusted."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("tasks are run by lm-evaluation-harness; pip install 'megakrause[eval]'") from error
    if json_path is not None and not json_path.parent.is_dir():
        raise UserError(f"--json {json_path}: there is no folder {json_path.parent}")
    with _exported(path) as folder:
        if not (trusted := is_code_ours(folder)) and not trust_remote_code and has_code(folder):
            raise UserError(f"{folder} has code of its own, which is not run unless asked for: --trust-remote-code")
        # Reading its thousands of task files takes seconds.
        manager = TaskManager(include_path=None if include is None else str(include))
        if unknown := set(tasks).difference(manager.all_tasks):
            raise UserError(f"lm-evaluation-harness has no task {min(unknown)}; `lm_eval ls tasks` lists its own")
        gpu = torch.cuda.is_available()
        try:
            model = HFLM(
                pretrained=str(folder),
                trust_remote_code=trusted or trust_remote_code,
                device="cuda" if gpu else "cpu",
                dtype="bfloat16" if gpu else "float32",
                batch_size=batch,
            )
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                verbosity="ERROR",
            )
        except Exception as error:  # of the harness, of `datasets`, of the network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{', '.join(tasks)} cannot be run on {path}: {reason}") from error
    assert found is not None
    if json_path is not None:
        kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found}
        json_path.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
    return table(list(_rows(found["results"], found.get("n-samples", {}))))


@contextmanager
def _exported(path: str) -> Iterator[Path]:
    """PATH itself, if it is a Hugging Face folder, or an export of the checkpoint that it is."""
    if (Path(path) / "config.json").is_file():
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "exported"
        export(path, folder)
        yield folder


def _rows(results: dict[str, dict[str, Any]], samples: dict[str, dict[str, int]]) -> Iterator[dict[str, object]]:
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task,
                "metric": metric if kind == "none" else f"{metric} ({kind})",
                "value": f"{value:.4f}",
                "stderr": f"{error:.4f}" if isinstance(error, float) else "",
                "examples": samples.get(task, {}).get("effective", ""),
            }
