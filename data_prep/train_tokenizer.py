"""Trains a lossless SentencePiece tokenizer on text files."""

from __future__ import annotations

import argparse
import os
import sys

from megakrause.data.inputs import INPUT_HELP, SUFFIX_HELP, SUFFIXES
from megakrause.data.sources import read_texts
from megakrause.data.tokenizer import train_tokenizer
from megakrause.errors import UserError, run_command

EXAMPLES = """examples:
  python data_prep/train_tokenizer.py --input corpus/ --vocab-size 32000 --output tokenizer.model
  python data_prep/train_tokenizer.py --input 'text/*.jsonl' notes.parquet --vocab-size 4096 --output small.model
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help=INPUT_HELP)
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces, 256 of them single bytes")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it if it is there")
    parser.add_argument("--kind", choices=["bpe", "unigram"], default="bpe", help="default: bpe")
    parser.add_argument("--sample-mb", type=int, default=64, help="most text to train on, in MiB; default: 64")
    parser.add_argument("--suffix", nargs="+", default=SUFFIXES, help=SUFFIX_HELP)
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to pass over")
    parser.add_argument("--text-field", default="text", help="field of objects, column of tables; default: text")
    parser.add_argument(
        "--document-separator", metavar="LINE", help="line that parts documents in text files; default: none does"
    )
    arguments = parser.parse_args()

    def run() -> None:
        if os.path.exists(arguments.output) and not arguments.overwrite:
            raise UserError(f"the tokenizer {arguments.output} is there: choose another name, or --overwrite")
        texts = read_texts(
            arguments.input,
            suffixes=arguments.suffix,
            exclude=arguments.exclude,
            text_field=arguments.text_field,
            document_separator=arguments.document_separator,
        )
        tokenizer = train_tokenizer(
            texts,
            arguments.vocab_size,
            arguments.output,
            kind=arguments.kind,
            sample_bytes=arguments.sample_mb << 20,
        )
        print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}")

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
