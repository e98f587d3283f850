"""Tokenizes text files into a corpus: PREFIX.bin, PREFIX.idx (Megatron's layout) and PREFIX.manifest.json."""

from __future__ import annotations

import argparse
import os
import sys

from megakrause.cli_arguments import number_or_share, positive
from megakrause.data.inputs import INPUT_HELP, SUFFIX_HELP, SUFFIXES
from megakrause.data.instructions import Instructions
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError, run_command

EXAMPLES = """examples:
  python data_prep/tokenize_text.py --input corpus/ --tokenizer tokenizer.model --output data/corpus
  python data_prep/tokenize_text.py --input 'text/*.jsonl.zst' more.parquet --text-field content \\
      --tokenizer tokenizer.model --output data/text --shard-mb 1024
  python data_prep/tokenize_text.py --input stories.txt --document-separator '<|endoftext|>' \\
      --tokenizer tokenizer.model --output data/stories
  python data_prep/tokenize_text.py --input hf:HuggingFaceFW/fineweb-edu:sample-10BT@train \\
      --tokenizer tokenizer.model --output data/fineweb
  python data_prep/tokenize_text.py --input flan.parquet --prompt-field inputs --response-field targets \\
      --max-tokens 2048 --tokenizer Llama-3.2-1B --output data/flan
  python data_prep/tokenize_text.py --input hf:HuggingFaceH4/ultrachat_200k@train_sft --messages-field messages \\
      --tokenizer Qwen2.5-7B-Instruct --output data/chat

A text or source file is one document, each line of a .jsonl, .ndjson or .json file is one, each row of a .parquet file
or a dataset is one; .gz and .zst files of text and JSON lines are read as they are. Every document ends with the
tokenizer's separator. What cannot be read is listed in PREFIX.quarantine.jsonl; a file that cannot be read to its end
stops it, unless --skip-damaged is given. Interrupted or killed, the same command goes on.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help=INPUT_HELP)
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model, or Hugging Face tokenizer folder")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="of the corpus's files, such as data/train; no folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus if there is one")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--suffix", nargs="+", default=SUFFIXES, help=SUFFIX_HELP)
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to pass over")
    parser.add_argument("--text-field", default="text", help="field of objects, column of tables; default: text")
    parser.add_argument(
        "--document-separator", metavar="LINE", help="line that parts documents in text files; default: none does"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt-field", metavar="FIELD", help="instructions: field of what is only read, not learnt from"
    )
    what.add_argument(
        "--messages-field", metavar="FIELD", help="conversations, for the tokenizer's chat template; answers are learnt"
    )
    parser.add_argument("--response-field", metavar="FIELD", help="instructions: what is learnt; default: targets")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        help="cut instructions there, leave out those with no response left; default: none",
    )
    parser.add_argument(
        "--eos", metavar="PIECE", help="of the tokenizer, after every document, or none; default: its own separator"
    )
    parser.add_argument("--min-chars", type=int, default=0, help="shorter documents are left out; default: 0")
    parser.add_argument("--max-chars", type=positive, help="longer documents are left out; default: none is")
    parser.add_argument(
        "--max-rejected",
        type=number_or_share,
        default="1%",
        metavar="N",
        help="stop at more bad documents than this, a number or a percentage; default: 1%%",
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="go on after a file that cannot be read to its end, and list it"
    )
    parser.add_argument("--shard-mb", type=positive, default=4096, help="largest .bin file, in MiB; default: 4096")
    parser.add_argument(
        "--max-document-mb", type=positive, default=256, help="longer documents are quarantined; default: 256"
    )
    arguments = parser.parse_args()

    def run() -> None:
        instructions = None
        if not (arguments.prompt_field or arguments.messages_field):
            for option in ("response_field", "max_tokens"):
                if getattr(arguments, option) is not None:
                    name = option.replace("_", "-")
                    raise UserError(f"--{name} is of instructions: give --prompt-field or --messages-field, too")
        elif arguments.eos or arguments.min_chars or arguments.max_chars or arguments.document_separator:
            raise UserError("--eos, --min-chars, --max-chars and --document-separator are not of instructions")
        if arguments.prompt_field or arguments.messages_field:
            pair = (arguments.prompt_field, arguments.response_field or "targets")
            fields = pair if arguments.prompt_field else (arguments.messages_field,)
            instructions = Instructions(fields, arguments.max_tokens)
        summary = tokenize_corpus(
            arguments.input,
            Tokenizer.load(arguments.tokenizer),
            arguments.output,
            workers=arguments.workers,
            suffixes=arguments.suffix,
            exclude=arguments.exclude,
            text_field=arguments.text_field,
            document_separator=arguments.document_separator,
            eos=arguments.eos,
            min_chars=arguments.min_chars,
            max_chars=arguments.max_chars,
            max_rejected=arguments.max_rejected,
            skip_damaged=arguments.skip_damaged,
            overwrite=arguments.overwrite,
            shard_bytes=arguments.shard_mb << 20,
            max_document=arguments.max_document_mb << 20,
            instructions=instructions,
        )
        print(
            f"{arguments.output}: {summary.documents} documents, {summary.tokens} tokens, {summary.text_bytes} bytes "
            f"({summary.text_bytes / summary.tokens:.2f} per token); {summary.empty} empty and {summary.filtered} "
            "filtered documents left out"
        )
        if summary.cut:
            print(f"{summary.cut} samples were longer than {arguments.max_tokens} tokens and were cut there")
        if summary.damaged:
            print(f"{summary.damaged} files could not be read to their end, see {summary.quarantine}", file=sys.stderr)
        if summary.rejected:
            print(f"{summary.rejected} documents were rejected, see {summary.quarantine}", file=sys.stderr)

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
