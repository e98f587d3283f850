"""What a run is trained and evaluated on."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megakrause.config.section import Section

NUMBER = re.compile(r"[-+]?[.,]?\d[\d.,]*(e[-+]?\d+)?%?|[-+]?(nan|inf)", re.IGNORECASE)


class SourceConfig(Section):
    """A corpus to train on, and its part in the mix."""

    path: str = Field(
        description="corpus PREFIX; or text that is tokenized while it is read: .txt, .md, .py, .jsonl, .ndjson, .json "
        "and .parquet files, also .gz and .zst, as one name or a pattern, or a dataset hf:ID (hf://... is a URL)"
    )
    weight: Annotated[float, Field(ge=0)] | list[Annotated[tuple[int, float], Field(strict=False)]] = Field(
        default=1.0,
        description="its share of the sequences; or [[0, w], [steps, w], ...]: w after so many steps",
    )
    epochs: float | None = Field(
        default=None, gt=0, description="how often it may be used; then the others share its part"
    )
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = Field(
        default=None, description="of a token, in files that do not say so"
    )
    text_field: str = Field(default="text", description="of the objects or rows of text")
    separator: str | None = Field(default=None, description="line between the documents of text files")

    @model_validator(mode="after")
    def check(self) -> SourceConfig:
        steps = [step for step, _ in self.weights]
        if steps and steps[0] > 0:
            raise ValueError(
                f"data.train: weight = {list(map(list, self.weights))} of {self.path}: the first step must be 0, as in "
                f"[[0, 0], {list(self.weights[0])}]"
            )
        if steps[:1] != [0] or steps != sorted(set(steps)) or min(weight for _, weight in self.weights) < 0:
            raise ValueError(
                f"data.train: weight = {self.weight} of {self.path} must be pairs [step, weight] with steps from 0 "
                "upwards and weights of at least 0"
            )
        return self

    @property
    def weights(self) -> list[tuple[int, float]]:
        """(after so many steps, weight), from 0 on."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]

    def weight_at(self, step: int) -> float:
        return [weight for start, weight in self.weights if start <= step][-1]


class DataConfig(Section):
    train: str | list[SourceConfig] = Field(
        description="corpus PREFIX (of PREFIX.bin, PREFIX.idx, PREFIX.manifest.json; or another kind, data/shards.py), "
        "or several as 'WEIGHT PREFIX WEIGHT PREFIX ...', or a list of tables"
    )
    valid: str | None = Field(default=None, description="held-out corpus PREFIX")
    tokenizer: str | None = Field(
        default=None, description="SentencePiece .model file, or Hugging Face tokenizer folder; none for images"
    )
    mask_documents: bool = Field(default=True, description="no attention across documents packed in one sequence")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat", description="documents joined and cut, or packed so that few are cut"
    )
    shuffle_blocks: int = Field(
        default=8, gt=0, description="blocks (of 65,536 documents, fewer long ones) whose sequences are mixed at a time"
    )
    prefetch: int = Field(default=4, ge=0, description="global batches read ahead")
    workers: int = Field(
        default=2, ge=0, description="processes of each rank that tokenize text, or decode images, as it is read"
    )
    cache: str | None = Field(
        default=None,
        description="folder on each host for what is read from URLs; default: megakrause in $XDG_CACHE_HOME or "
        "~/.cache",
    )
    cache_gib: int = Field(default=16, gt=0, description="its largest size, in GiB")

    @model_validator(mode="after")
    def check(self) -> DataConfig:
        words = self.train.split() if isinstance(self.train, str) else []
        # A slip in a mix, not a name with spaces: some word is a number, or is meant to be one, as 0,7 or 70%.
        if len(words) > 1 and any(NUMBER.fullmatch(word) for word in words) and not _is_mix(words):
            raise ValueError(
                f"data.train = '{self.train}' is no 'WEIGHT PREFIX WEIGHT PREFIX ...' with weights of at least 0, such "
                "as '0.7 data/web 0.3 data/code'; for names with spaces write tables, [{ path = \"my web\" }]"
            )
        if not any(source.weight_at(0) for source in self.sources):
            raise ValueError("data.train: no source has a weight at step 0; give one a weight above 0")
        return self

    @property
    def sources(self) -> list[SourceConfig]:
        """What data.train lists, however it is written."""
        if not isinstance(self.train, str):
            return self.train
        words = self.train.split()
        if not _is_mix(words):
            return [SourceConfig(path=self.train)]
        return [SourceConfig(path=p, weight=float(w)) for p, w in zip(words[1::2], words[::2], strict=True)]


def _is_mix(words: list[str]) -> bool:
    """Whether they are WEIGHT PREFIX WEIGHT PREFIX ..."""
    try:
        return len(words) >= 2 and len(words) % 2 == 0 and all(0 <= float(word) < math.inf for word in words[::2])
    except ValueError:
        return False


class AugmentConfig(Section):
    """What is done to the images that a classifier is trained on (data/augment.py); an image model takes only `flip`.
    Whatever is random is a function of the run's seed and of which image it is in which epoch."""

    crop: Literal["none", "pad", "random_resized"] = Field(
        default="none",
        description="the image as in evaluation; a part of it with a black margin; or a part of random size and shape",
    )
    padding: int = Field(default=4, ge=0, description="of crop = pad, in pixels")
    min_scale: float = Field(default=0.08, gt=0, le=1, description="of crop = random_resized: least part of the area")
    flip: bool = Field(default=False, description="mirror every other image")
    rand_augment: int = Field(default=0, ge=0, description="operations of RandAugment (arXiv 1909.13719)")
    magnitude: int = Field(default=9, ge=0, le=30, description="of these operations")
    color_jitter: float = Field(default=0.0, ge=0, le=1, description="change of brightness, contrast and saturation")
    erasing: float = Field(default=0.0, ge=0, le=1, description="share of the images with a part erased")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup (arXiv 1710.09412); 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix (arXiv 1905.04899); 0: none")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mean: list[float] | None = Field(default=None, description="of each channel, of values 0 to 1; default: 0.5")
    std: list[float] | None = Field(default=None, description="of each channel; default: 0.5")
