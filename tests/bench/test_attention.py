"""The attention benchmarks check before they time, and write what they measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megakrause.bench import attention, decode
from megakrause.cli import main
from megakrause.errors import UserError
from megakrause.ops.krause import krause_attention


def test_it_writes_tables_and_a_picture(tmp_path: Path) -> None:
    report, picture = tmp_path / "attention.json", tmp_path / "attention.png"
    sizes = ["--lengths", "32", "64", "--window", "16", "--top-k", "4", "--heads", "2", "--head-dim", "8"]
    main(["bench", "attention", *sizes, "--json", str(report), "--plot", str(picture)])
    result = json.loads(report.read_text())
    assert result["setting"]["window"] == 16
    assert [row["T"] for row in result["rows"]] == [32, 64]
    for row in result["rows"]:
        for kind in ("forward", "forward + backward"):
            assert all(row[kind][f"{name} ms"] > 0 for name in ("krause", "k >= W", "sdpa", "published"))
            assert row[kind]["x published"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["krause", "published"])
def test_nothing_is_timed_when_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    if wrong == "krause":
        monkeypatch.setattr(attention, "krause", lambda setting, top_k: partial(slightly_off, setting, top_k))
    else:
        right = attention.published
        monkeypatch.setattr(attention, "published", lambda *arguments: 1.001 * right(*arguments))
    monkeypatch.setattr(attention, "measure", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(UserError, match=f"{wrong} differs from the reference by .*; nothing was timed"):
        attention.run(attention.Setting(window=16, top_k=4, heads=2, head_dim=8), [32], None, None)


def slightly_off(setting: attention.Setting, top_k: int | None, *inputs: torch.Tensor) -> torch.Tensor:
    return 1.001 * krause_attention(*inputs, window=setting.window, top_k=top_k)


def test_a_decoding_step_is_timed_at_any_position(tmp_path: Path) -> None:
    report = tmp_path / "decode.json"
    main(["bench", "decode", "--positions", "5", "300", "--json", str(report)])
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    assert [row["position"] for row in rows] == [5, 300]
    assert all(row["krause ms"] > 0 and row["softmax ms"] > 0 for row in rows)


def test_a_cache_that_forgets_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = decode.LanguageModel.forward

    def forgetful(self: Any, tokens: torch.Tensor, doc_start: Any = None, cache: Any = None) -> torch.Tensor:
        if cache is not None and cache.position == 200:
            cache.layers = self.new_cache().layers
        return forward(self, tokens, doc_start, cache)

    monkeypatch.setattr(decode.LanguageModel, "forward", forgetful)
    with pytest.raises(UserError, match="krause: logits with a cache differ.*nothing was timed"):
        decode.run([5], 1, None)
