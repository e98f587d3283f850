"""What the parts of the command line have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def command(
    commands: argparse._SubParsersAction, name: str, help: str, examples: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def number_or_share(text: str) -> int | float:
    """ "5" is 5, "5%" is 0.05."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else int(text)
        if value < 0 or (isinstance(value, float) and not value <= 1):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number, as 25, nor a percentage, as 0.5%") from None
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
