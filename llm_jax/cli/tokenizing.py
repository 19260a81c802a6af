"""`llm-jax prepare` and `llm-jax tokenize`: text to tokens, and tokenizers."""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

from llm_jax.cli.shared import print_json, say, warn_of_special
from llm_jax.files import whole_folder


def prepare(args: Namespace) -> None:
    """Tokenize the text at URI into shards, once.

    URI is builtin:python (or numbers, or brackets), a file, a folder, a pattern, hf://datasets/..., or any address that
    fsspec reads: text, or rows of .jsonl, .json, .csv, .tsv or .parquet. Training does this automatically, into a
    cache; do it yourself for text that several machines share.

      llm-jax prepare builtin:python --out data/python --tokenizer train:8192
      llm-jax train quickstart data.uri=data/python data.tokenizer=train:8192 model.vocab_size=8192
      llm-jax prepare s3://bucket/web --out data/web --tokenizer gpt2 --workers ray://head:10001
    """
    from llm_jax.data import prepare as preparing

    options = {name: vars(args)[name] for name in preparing.SETTINGS}
    manifest = preparing.prepare(args.uri, args.out, **options, workers=args.workers, report=say)
    if args.json:
        print_json(dataclasses.asdict(manifest))
    else:
        tokenizer = f"data.tokenizer={args.tokenizer} model.vocab_size={-(-manifest.vocab_size // 64) * 64}"
        print(f"done; train on it with: llm-jax train CONFIG data.uri={args.out} {tokenizer}")


def tokenize(args: Namespace) -> None:
    """Show the tokens of a text, decode ids, or train a tokenizer.

    Each token is above its id; a blank is a dot, and a byte of a larger character is in hexadecimal. Raise an error
    (exit status 2) for --column without --train, and for a new tokenizer without a new folder.

      llm-jax tokenize 'def f(x): return x' --tokenizer runs/quickstart
      llm-jax tokenize --tokenizer gpt2 --decode 15496 11 995
      llm-jax tokenize --train essays/ --vocab 8192 --out tokenizers/essays
    """
    from llm_jax.cli import terminal
    from llm_jax.data import tokenizer

    if args.train:
        _train_tokenizer(args)
        return
    if args.column is not None:
        raise ValueError(f"--column {args.column} is for the data that a tokenizer is trained on; add --train URI")
    given = sys.stdin.read() if args.text is None and args.decode is None else args.text or ""
    inside = Path(args.tokenizer) / "tokenizer"  # of a run, or of prepared data
    coder = tokenizer.load_tokenizer(inside) if inside.is_dir() else tokenizer.build(args.tokenizer, lambda: [given])
    if not args.special:
        warn_of_special(coder, [given])
    tokens = coder.encode(given, special=args.special).tolist() if args.decode is None else args.decode
    if args.json:
        pieces = [coder.decode([token]) for token in tokens]
        print_json({"tokenizer": coder.name, "ids": tokens, "text": coder.decode(tokens), "pieces": pieces})
    elif args.decode is not None:
        terminal.write(coder.decode(tokens) + "\n")
    else:
        terminal.write_tokens(coder, tokens)
        size = len(given.encode())
        print(f"\n{len(tokens):,} tokens of {coder.name}, {size / max(1, len(tokens)):.2f} bytes each")


def _train_tokenizer(args: Namespace) -> None:
    from llm_jax.data import sources, tokenizer

    if not args.out or Path(args.out).exists():
        raise ValueError(f"--train saves the tokenizer in a new folder; add --out DIR (got {args.out})")
    documents = sources.documents(args.train, column=args.column, report=say)
    text = tokenizer.train(args.vocab, (document.text for document in documents))
    with whole_folder(Path(args.out), "tokenizer") as folder:
        text.save(folder)
    if args.json:
        print_json({"tokenizer": args.out, "vocab_size": text.vocab_size})
        return
    print(f"{text.vocab_size:,} ids; look at them with: llm-jax tokenize TEXT --tokenizer {args.out}")
