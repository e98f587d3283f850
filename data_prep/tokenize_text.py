"""Tokenizes text files into a corpus: PREFIX.bin, PREFIX.idx (Megatron's layout) and PREFIX.manifest.json."""

from __future__ import annotations

import argparse
import os
import sys

from megakrause.data.prepare import tokenize_corpus
from megakrause.data.sources import SUFFIXES
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import run_command

EXAMPLES = """examples:
  python data_prep/tokenize_text.py --input corpus/ --tokenizer tokenizer.model --output data/corpus --workers 8
  python data_prep/tokenize_text.py --input 'text/*.jsonl' --text-field content --tokenizer tokenizer.model \\
      --output data/text --shard-mb 1024

A text or source file is one document, each line of a .jsonl file is one; every document ends with the tokenizer's
separator. What cannot be read is listed in PREFIX.quarantine.jsonl.
"""


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="files, folders, or globs in quotes")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model file")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the corpus's files")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument(
        "--suffix", nargs="+", default=SUFFIXES, help=f"of files in folders; default: {' '.join(SUFFIXES)}"
    )
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to pass over")
    parser.add_argument("--text-field", default="text", help="field of .jsonl objects; default: text")
    parser.add_argument("--shard-mb", type=positive, default=4096, help="largest .bin file, in MiB; default: 4096")
    parser.add_argument(
        "--max-document-mb", type=positive, default=256, help="longer documents are quarantined; default: 256"
    )
    arguments = parser.parse_args()

    def run() -> None:
        summary = tokenize_corpus(
            arguments.input,
            Tokenizer.load(arguments.tokenizer),
            arguments.output,
            workers=arguments.workers,
            suffixes=arguments.suffix,
            exclude=arguments.exclude,
            text_field=arguments.text_field,
            shard_bytes=arguments.shard_mb << 20,
            max_document=arguments.max_document_mb << 20,
        )
        print(
            f"{arguments.output}: {summary.documents} documents, {summary.tokens} tokens, {summary.text_bytes} bytes "
            f"({summary.text_bytes / summary.tokens:.2f} per token); {summary.empty} empty documents left out"
        )
        if summary.rejected:
            print(f"{summary.rejected} documents were rejected, see {summary.quarantine}", file=sys.stderr)

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
