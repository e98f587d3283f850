"""The config: what it reads, what it refuses, and how it says so."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from megakrause.config import RunConfig
from megakrause.config.file import load_config, parse_config
from megakrause.errors import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))

SMALL: dict[str, Any] = {
    "output": "runs/x",
    "model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "window": 16},
    "data": {"train": "data/train", "tokenizer": "data/tokenizer.model"},
    "optim": {"lr": 0.001},
    "train": {"steps": 100, "global_batch": 12, "seq_len": 64},
}


def tree(*removed: str, **changes: Any) -> dict[str, Any]:
    """SMALL with keys (section__key) changed or removed."""
    result = copy.deepcopy(SMALL)
    for name in removed:
        section, _, key = name.partition("__")
        del (result[section] if key else result)[key or section]
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            result.setdefault(section, {})[key] = value
        else:
            result[section] = value
    return result


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(SMALL))
    return path


# ---- reading


def test_shipped_configs_load_and_write_themselves_back(tmp_path: Path) -> None:
    assert SHIPPED
    for path in SHIPPED:
        config = load_config(path)
        (tmp_path / "again.toml").write_text(config.to_toml())
        assert load_config(tmp_path / "again.toml") == config, path


def test_defaults_that_depend_on_other_keys() -> None:
    model = parse_config(SMALL).model
    assert (model.num_kv_heads, model.head_size, model.attention_of_layers) == (4, 8, ["krause", "krause"])
    model = parse_config(tree(model__kv_heads=2, model__head_dim=6, model__attention=["softmax", "krause"])).model
    assert (model.num_kv_heads, model.head_size, model.attention_of_layers) == (2, 6, ["softmax", "krause"])


@given(
    layers=st.lists(st.sampled_from(["krause", "softmax"]), min_size=1, max_size=5),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    output=st.text(st.characters(codec="utf-8"), min_size=1),
    top_k=st.none() | st.integers(1, 2**40),
    resume=st.booleans(),
)
def test_what_is_written_is_read_back_equal(
    layers: list[str], lr: float, output: str, top_k: int | None, resume: bool
) -> None:
    changes: dict[str, Any] = dict(model__layers=len(layers), model__attention=layers, optim__lr=lr, output=output)
    changes |= dict(checkpoint__resume=resume) | ({} if top_k is None else dict(model__top_k=top_k))
    config = parse_config(tree(**changes))
    assert parse_config(tomllib.loads(config.to_toml())) == config
    assert config.optim.lr == lr and config.output == output


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(SMALL).train.steps = 3  # type: ignore[misc]


# ---- overrides


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.steps=1_000", "train", "steps", 1000),
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.weight_decay=0", "optim", "weight_decay", 0.0),
        ("log.tensorboard=false", "log", "tensorboard", False),
        ("model.tie_embeddings=true", "model", "tie_embeddings", True),
        ('model.attention=["softmax", "krause"]', "model", "attention", ["softmax", "krause"]),
        ("model.attention=softmax", "model", "attention", "softmax"),
        ("data.train=/some/where/a-b_c", "data", "train", "/some/where/a-b_c"),
        ('data.train="7"', "data", "train", "7"),
        ("data.train=a=b", "data", "train", "a=b"),
        (" train.steps = 7", "train", "steps", 7),
        ("model.top_k=none", "model", "top_k", None),
        ("checkpoint.keep=none", "checkpoint", "keep", 2),
    ],
)
def test_overrides(small: Path, override: str, section: str, key: str, value: Any) -> None:
    config = load_config(small, ["model.top_k=4", "checkpoint.keep=9", override])
    found = getattr(getattr(config, section), key)
    assert found == value and type(found) is type(value)


def test_overrides_of_top_level_keys_and_of_several_keys(small: Path) -> None:
    config = load_config(small, ["output=elsewhere", "train.steps=5", "train.steps=6", "parallel.zero=2"])
    assert (config.output, config.train.steps, config.parallel.zero) == ("elsewhere", 6, 2)
    assert config == load_config(small).model_copy(
        update={"output": "elsewhere", "train": config.train, "parallel": config.parallel}
    )


@pytest.mark.parametrize(
    "override, says",
    [
        ("train.steps", "'train.steps' is not an override; write section.key=value, such as train.steps=100"),
        ("=3", "'=3' is not an override"),
        ("output.name=3", "unknown config key 'output.name': 'output' is a value, not a section"),
        ("train.steps.more=3", "unknown config key 'train.steps.more': 'steps' is a value, not a section"),
        ("train.step=3", "unknown config key 'train.step'; did you mean 'train.steps'?"),
        ("steps=3", "unknown config key 'steps'; did you mean 'train.steps'?"),
        ("trian.steps=3", "unknown config key 'trian'; did you mean 'train'?"),
        ("model.windwo=3", "unknown config key 'model.windwo'; did you mean 'model.window'?"),
        ("optim.learning_rate=3", "unknown config key 'optim.learning_rate'; did you mean 'optim."),
        ("model.layers=none", "config key 'model.layers' is missing"),
        ("optim=none", "config key 'optim' is missing"),
        ("model.lora.rank=4", "config key 'model.lora.alpha' is missing"),
    ],
)
def test_overrides_that_cannot_be(small: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(small, [override])
    assert str(raised.value).startswith(says)


# ---- what is refused: one line that names the key, the value and what would be legal


@pytest.mark.parametrize(
    "changes, names",
    [
        # one key
        (dict(model__window=0), ["model.window", "0", "greater than 0"]),
        (dict(model__top_k=0), ["model.top_k", "0", "greater than 0"]),
        (dict(model__layers=-1), ["model.layers", "-1", "greater than 0"]),
        (dict(model__layers="two"), ["model.layers", "'two'", "integer"]),
        (dict(model__sigma=0.0), ["model.sigma", "0.0", "greater than 0"]),
        (dict(model__kind="vlm"), ["model.kind", "'vlm'", "'lm'"]),
        (
            dict(model__attention="linear"),
            ["model.attention = 'linear'", "'krause', 'softmax', 'softmax_window' or 'dual'"],
        ),
        (
            dict(model__attention=["krause", "linear"]),
            ["model.attention = ['krause', 'linear']", "'krause', 'softmax', 'softmax_window' or 'dual'"],
        ),
        (dict(model__positions="alibi"), ["model.positions", "'alibi'", "'rope' or 'learned'"]),
        (dict(model=3), ["model", "3", "dictionary"]),
        (dict(optim__lr=0), ["optim.lr", "0", "greater than 0"]),
        (dict(optim__lr=float("inf")), ["optim.lr", "inf", "finite"]),
        (dict(optim__min_lr=float("nan")), ["optim.min_lr", "nan", "finite"]),
        (dict(optim__beta2=1.0), ["optim.beta2", "1.0", "less than 1"]),
        (dict(optim__schedule="linear"), ["optim.schedule", "'linear'", "'cosine', 'wsd' or 'constant'"]),
        (dict(train__steps=2.5), ["train.steps", "2.5", "integer"]),
        (dict(train__precision="fp16"), ["train.precision", "'fp16'", "'fp32' or 'bf16'"]),
        (dict(parallel__zero=4), ["parallel.zero", "4", "0, 1, 2 or 3"]),
        (dict(checkpoint__keep=0), ["checkpoint.keep", "0", "greater than 0"]),
        (dict(log__every=0), ["log.every", "0", "greater than 0"]),
        (dict(output=7), ["output", "7", "string"]),
        # several keys together
        (dict(model__kv_heads=3), ["model.kv_heads = 3", "model.heads = 4", "[1, 2, 4]"]),
        (dict(model__width=33), ["model.width = 33", "model.heads = 4", "model.head_dim"]),
        (dict(model__head_dim=7), ["model.head_dim = 7", "even", "8"]),
        (dict(model__width=36), ["model.head_dim = 9", "even", "10"]),
        (dict(model__attention=["krause"]), ["model.attention", "1 layers", "model.layers = 2"]),
        (dict(model__positions="learned"), ["model.max_positions is missing", "train.seq_len"]),
        (
            dict(model__positions="learned", model__max_positions=63),
            ["train.seq_len = 64", "at most model.max_positions = 63"],
        ),
        (
            dict(model__lora={"rank": 4, "alpha": 1.0, "rnak": 2}),
            ["'model.lora.rnak'", "did you mean 'model.lora.rank'"],
        ),
        (dict(model__lora={"rank": 0, "alpha": 1.0}), ["model.lora.rank", "0", "greater than 0"]),
        (
            dict(model__lora={"rank": 4, "alpha": 1.0, "targets": ["q_proj"]}),
            ["model.lora.targets", "'q_proj'", "'query'"],
        ),
        (
            dict(model__lora={"rank": 4, "alpha": 1.0, "targets": ["krause.query"]}),
            ["model.lora.targets has 'krause.query'", "only dual layers have a Krause branch"],
        ),
        (
            dict(
                model__lora={"rank": 4, "alpha": 1.0, "targets": ["krause.query"]},
                model__attention=["softmax", "dual"],
                parallel__pp=2,
            ),
            ["parallel.pp = 2", "nothing to train in softmax layers", "'query'"],
        ),
        (dict(optim__min_lr=0.01), ["optim.min_lr = 0.01", "optim.lr = 0.001"]),
        (dict(train__eval_every=10), ["train.eval_every = 10", "data.valid", "train.eval_every = 0"]),
    ],
    ids=str,
)
def test_bad_values_are_named_in_one_line(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_config(tree(**changes))
    message = str(raised.value)
    assert "\n" not in message and len(message) < 300
    assert [name for name in names if name not in message] == [], message


@pytest.mark.parametrize("key", ["output", "model", "model__width", "data__tokenizer", "optim__lr", "train__seq_len"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config(tree(key))
    assert str(raised.value) == f"config key '{key.replace('__', '.')}' is missing; it has no default"


def test_a_krause_layer_needs_a_window_and_a_softmax_layer_none() -> None:
    with pytest.raises(UserError, match="model.window is missing.*model.window = 128"):
        parse_config(tree("model__window"))
    assert parse_config(tree("model__window", model__attention="softmax")).model.window is None


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__positions="learned", model__max_positions=64),
        dict(model__top_k=1000),
        dict(model__head_dim=7, model__positions="learned", model__max_positions=64),
        dict(optim__min_lr=0.001),
        dict(train__eval_every=10, data__valid="data/valid"),
    ],
    ids=str,
)
def test_the_bounds_themselves_are_legal(changes: dict[str, Any]) -> None:
    parse_config(tree(**changes))


# ---- what data.train lists


def sources(train: Any) -> list[tuple[str, list[tuple[int, float]]]]:
    return [(source.path, source.weights) for source in parse_config(tree(data__train=train)).data.sources]


def test_the_corpora_of_data_train() -> None:
    assert sources("data/a") == [("data/a", [(0, 1.0)])]
    assert sources("0.3 data/a 7 b") == [("data/a", [(0, 0.3)]), ("b", [(0, 7.0)])]
    assert sources("a folder/of mine") == [("a folder/of mine", [(0, 1.0)])]
    tables = [{"path": "a", "weight": [[0, 0.5], [1000, 2]]}, {"path": "b", "epochs": 4.0}]
    assert sources(tables) == [("a", [(0, 0.5), (1000, 2.0)]), ("b", [(0, 1.0)])]
    config = parse_config(tree(data__train=tables))
    assert parse_config(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    "train, says",
    [
        ([{"path": "a", "weight": -1}], r"data.train\[0\].weight = -1 is not allowed: input should be greater than or"),
        (
            [{"path": "a"}, {"path": "b", "wieght": 1}],
            r"unknown key 'wieght' in data.train\[1\]; there are path, weight",
        ),
        ([{"weight": 1.0}], r"config key 'data.train\[0\].path' is missing"),
        ([{"path": "a", "epochs": 0}], r"data.train\[0\].epochs = 0 is not allowed"),
        ([{"path": "a", "weight": [[5, 1.0]]}], r"weight = \[\[5, 1.0\]\] of a: the first step must be 0, as in "),
        ([{"path": "a", "weight": [[12, 0.3]]}], r"as in \[\[0, 0\], \[12, 0.3\]\]$"),
        ([{"path": "a", "weight": [[0, 1.0], [9, 1.0], [9, 2.0]]}], "must be pairs .* with steps from 0 upwards"),
        ([{"path": "a", "weight": [[0, 1.0], [9, -1.0]]}], "weights of at least 0"),
        ([{"path": "a", "weight": 0}], "no source has a weight at step 0"),
        ("0 a 0 b", "no source has a weight at step 0"),
        ([], "no source has a weight at step 0"),
        (3, "data.train = 3 is not allowed"),
        *(
            (train, "^data.train = .* is no 'WEIGHT PREFIX WEIGHT PREFIX ...' .*; for names with spaces write tables")
            for train in (
                "1 a b",
                "1 a 2",
                "a 1",
                "x.5 a 1 b",
                "-1 a 2 b",
                "0,7 a 0,3 b",
                "70% a",
                "nan a 1 b",
                "1 a inf b",
            )
        ),
    ],
)
def test_mixes_that_cannot_be_are_explained(train: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_config(tree(data__train=train))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing, broken, binary = tmp_path / "missing.toml", tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("output = \n")
    binary.write_bytes(b"output = '\xff\xfe'")
    for path, says in [
        (missing, "No such file"),
        (tmp_path, "Is a directory"),
        (broken, "not valid TOML"),
        (binary, "not valid TOML"),
    ]:
        with pytest.raises(UserError, match=says) as raised:
            load_config(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


# ---- the global batch


def config(global_batch: int, micro_batch: int | None = None) -> RunConfig:
    changes = {} if micro_batch is None else {"train__micro_batch": micro_batch}
    return parse_config(tree(train__global_batch=global_batch, **changes))


@pytest.mark.parametrize(
    "global_batch, micro_batch, ranks, expected",
    [(12, None, 1, (12, 1)), (12, None, 4, (3, 1)), (12, 3, 1, (3, 4)), (12, 3, 2, (3, 2)), (12, 1, 12, (1, 1))],
)
def test_the_global_batch_is_cut(
    global_batch: int, micro_batch: int | None, ranks: int, expected: tuple[int, int]
) -> None:
    assert config(global_batch, micro_batch).accumulation(ranks) == expected


@pytest.mark.parametrize(
    "global_batch, micro_batch, ranks, says",
    [
        (12, None, 5, "train.global_batch = 12 cannot be shared by 5 .*; use a multiple of 5"),
        (12, 5, 1, "train.global_batch = 12 .* train.micro_batch = 5 x 1 .*; use train.micro_batch = 4"),
        (12, 5, 2, "train.global_batch = 12 .* train.micro_batch = 5 x 2 .*; use train.micro_batch = 3"),
        (12, 24, 1, "train.micro_batch = 24 x 1 .*; use train.micro_batch = 12"),
    ],
)
def test_batches_that_cannot_be_cut_are_explained(
    global_batch: int, micro_batch: int | None, ranks: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        config(global_batch, micro_batch).accumulation(ranks)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 16))
def test_what_is_proposed_instead_works(global_batch: int, micro_batch: int, ranks: int) -> None:
    try:
        micro, times = config(global_batch, micro_batch).accumulation(ranks)
    except UserError as error:
        if global_batch % ranks == 0:
            proposed = int(str(error).rpartition(" = ")[2])
            micro, times = config(global_batch, proposed).accumulation(ranks)
            assert micro == proposed and micro * times * ranks == global_batch
    else:
        assert micro == micro_batch and micro * times * ranks == global_batch
