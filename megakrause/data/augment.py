"""What an image is turned into before a model sees it: decoded, cut to size, and in training changed at random.

Pixels are worked on by Pillow: it decodes what there is, needs nothing compiled beside itself, and its operations are
those that RandAugment and its recipes were made of. Whatever is random comes from a generator of (key, number of the
sample in the run), so that a sample is the same for any number of workers and ranks.

Gray images become colour ones and the other way round, as a model needs; of CMYK, palettes and transparency remains the
colour; 16 bits a channel become 8; channels of 32 bits, which have no known range, are refused. An image that is
smaller than the model's is enlarged.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from megakrause.config import AugmentConfig

CENTRE = 0.875  # of the shorter side that evaluation sees, where an image is not of the model's size
LEVELS = 30  # of RandAugment's magnitude
GRAY = 128  # fills what an operation moves away from
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PIXELS, ERASING, MIXING = range(3)  # what a sample's generators are for


def generator(key: int, number: int, purpose: int) -> np.random.Generator:
    """For one purpose of one sample of a run, or pair of samples."""
    return np.random.Generator(np.random.Philox(key=np.array([key, number], np.uint64), counter=purpose << 128))


class NoImage(Exception):
    """A file that cannot be decoded."""


def decode(content: bytes, channels: int) -> Image.Image:
    """An image file as gray (1 channel) or RGB (3). Raises NoImage."""
    return _converted(opened(content), channels)


def opened(content: bytes) -> Image.Image:
    """An image file of 8 bits a channel, in a mode that becomes gray or RGB. Raises NoImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of other formats, some are handed on to other programs.
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
            if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PPM":
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would cut off at 255
            if image.mode in ("I", "F"):
                raise NoImage("32 bits a channel")
            _converted(image.resize((1, 1)), 3)
            return image
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything
        said = str(error) if content and "BytesIO" not in str(error) else "no image of a known format"
        raise NoImage(said or type(error).__name__) from error


def _converted(image: Image.Image, channels: int) -> Image.Image:
    image = image if image.mode == "L" else image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


@dataclass(frozen=True)
class View:
    """How a model sees images. augment: None for evaluation."""

    height: int
    width: int
    channels: int
    augment: AugmentConfig | None = None

    def __call__(self, content: bytes, random: np.random.Generator) -> np.ndarray:
        """uint8 [height, width, channels]"""
        image = decode(content, self.channels)
        image = self._fitted(image) if self.augment is None else self._augmented(image, self.augment, random)
        return np.asarray(image, np.uint8).reshape(self.height, self.width, self.channels)

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The image where it is of the right size; else its centre, as large as the right proportions allow."""
        if image.size == (self.width, self.height):
            return image
        scale = min(image.width / self.width, image.height / self.height) * CENTRE
        width, height = scale * self.width, scale * self.height
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        return image.resize((self.width, self.height), BICUBIC, box)

    def _augmented(self, image: Image.Image, augment: AugmentConfig, random: np.random.Generator) -> Image.Image:
        if augment.crop == "random_resized":
            image = image.resize((self.width, self.height), BICUBIC, random_box(image, augment.min_scale, random))
        else:
            image = self._fitted(image)
        if augment.crop == "pad":
            left, top = random.integers(0, 2 * augment.padding + 1, 2).tolist()
            padded = ImageOps.expand(image, augment.padding)
            image = padded.crop((left, top, left + self.width, top + self.height))
        if augment.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        for _ in range(augment.rand_augment):
            operation = OPERATIONS[int(random.integers(len(OPERATIONS)))]
            image = operation(image, augment.magnitude / LEVELS, 1 if random.random() < 0.5 else -1)
        if augment.color_jitter:
            change = augment.color_jitter
            for place in random.permutation(len(JITTERS)).tolist():
                image = JITTERS[place](image).enhance(random.uniform(max(0.0, 1 - change), 1 + change))
        return image


def random_box(image: Image.Image, min_scale: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """A part of an image, of min_scale of its area to all of it, and 3:4 to 4:3 wide, as Inception had it (Szegedy et
    al., arXiv 1409.4842)."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(min_scale, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= image.width and height <= image.height:
            left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
            return left, top, left + width, top + height
    side = min(image.width, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


def erase(image: np.ndarray, random: np.random.Generator) -> None:
    """Fills a part of a normalized image, float32 [c, height, width], with noise (random erasing, Zhong et al., arXiv
    1708.04896): 2 % to a third of its area, 3:10 to 10:3 wide."""
    channels, height, width = image.shape
    for _ in range(10):
        area = height * width * random.uniform(0.02, 1 / 3)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            image[:, top : top + h, left : left + w] = random.standard_normal((channels, h, w), np.float32)
            return


def mixing(augment: AugmentConfig, height: int, width: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """How a pair of samples is mixed: what of the other's pixels each takes, float32 [height, width], and what of its
    target. By mixup (Zhang et al., arXiv 1710.09412) or cutmix (Yun et al., arXiv 1905.04899); half of the pairs by
    either, where both are wanted."""
    cut = augment.cutmix > 0 and (augment.mixup == 0 or random.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(random.beta(alpha, alpha))
    taken = np.full((height, width), share, np.float32)
    if cut:
        h, w = round(height * math.sqrt(share)), round(width * math.sqrt(share))
        top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
        taken[:] = 0
        taken[top : top + h, left : left + w] = 1
    return taken, float(taken.mean(dtype=np.float64))


# ---- RandAugment's operations: (image, strength 0..1, sign)


Operation = Callable[[Image.Image, float, int], Image.Image]


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = GRAY if image.mode == "L" else (GRAY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BILINEAR, fillcolor=fill)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: list[Operation] = [
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    lambda image, strength, sign: ImageOps.solarize(image, round(256 - 256 * strength)),
    lambda image, strength, sign: image.rotate(
        sign * 30 * strength, BILINEAR, fillcolor=GRAY if image.mode == "L" else (GRAY,) * 3
    ),
    lambda image, strength, sign: _moved(image, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    lambda image, strength, sign: _moved(image, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    lambda image, strength, sign: _moved(image, (1, 0, sign * 0.45 * strength * image.width, 0, 1, 0)),
    lambda image, strength, sign: _moved(image, (1, 0, 0, 0, 1, sign * 0.45 * strength * image.height)),
    *map(_enhanced, (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)),
]
JITTERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
