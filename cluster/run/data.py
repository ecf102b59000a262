"""What a combined run is trained on: text, byte by byte or by a tokenizer, or a file of token ids. Lecture 02."""

import argparse

from core.model.config import ModelConfig
from core.model.text import VOCABULARY, Text
from core.model.tokenizer import Tokenizer
from core.model.tokens import TYPES, Tokens
from core.proof.lesson import Lesson
from core.proof.rules import Rule, at_least, check

HELD_OUT = 0.1  # of the data, for validation


def add_data_flags(lesson: Lesson) -> None:
    flag = lesson.parser.add_argument_group("data").add_argument
    flag("--tokens", metavar="FILE.npy|FILE.bin", help="token ids to train on, in place of --data")
    flag("--token-type", choices=TYPES, help="of a .bin")
    flag("--tokenizer", metavar="tokenizer.json", help="for --data, and what is written; needs the extra 'hf'")
    flag("--vocabulary", type=int, default=0, help="of the model; 0: the tokenizer's, of bytes 256")
    flag("--eos", type=int, metavar="ID", help="the token that ends a document")
    flag("--pack", action="store_true", help="a token attends only to its own document, where positions begin at 0")


RULES = (
    at_least("vocabulary", 0, VOCABULARY),
    Rule(
        "tokens and data",
        "--tokens {tokens} --data {data}",
        lambda case: case.tokens is None or case.data is None,
        "one of them is trained on",
        lambda case: f"--tokens {case.tokens} alone",
        peer="cannot be: a run has one stream of tokens",
    ),
    Rule(
        "token-type",
        "--token-type {token_type}",
        lambda case: case.token_type is None or case.tokens is not None,
        "is of a file of --tokens",
        lambda case: "--tokens FILE.bin with it",
        peer="cannot be: text has no type, and a .npy says its own",
    ),
    Rule(
        "pack",
        "--pack",
        lambda case: not case.pack or case.eos is not None,
        "needs the token that ends a document",
        lambda case: "--eos ID with it",
        peer="cannot be: nothing says where a document ends",
    ),
)


def data_of(args: argparse.Namespace) -> Text | Tokens:
    """Where the batches come from. Raises ValueError where that cannot be read."""
    if args.tokens is not None:
        return Tokens(args.tokens, args.sequence, args.vocabulary, args.token_type)
    return Text(args.data, args.sequence, Tokenizer(args.tokenizer) if args.tokenizer else None)


def check_data(args: argparse.Namespace, model: ModelConfig | None) -> None:
    """Decide `args.vocabulary` where the flags leave it open, and look at the data, a file of up to 2^28 ids in whole.

    Args:
        model: of `--hf`, which says the vocabulary.

    Raises:
        ValueError: the flags do not fit each other, the model or the data.
    """
    check(args, RULES)
    least, whose = VOCABULARY if args.tokens is None else 1, "text in bytes"
    if args.tokenizer:
        least, whose = Tokenizer(args.tokenizer).vocabulary, f"--tokenizer {args.tokenizer}"
    if model is not None:
        if args.vocabulary not in (0, model.vocabulary):
            raise ValueError(
                f"--vocabulary {args.vocabulary}: --hf {args.hf} has {model.vocabulary}, and says what the model is; "
                "leave --vocabulary out"
            )
        args.vocabulary = model.vocabulary
    elif not args.vocabulary:
        if args.tokens is not None and not args.tokenizer:
            raise ValueError(
                f"--tokens {args.tokens}: does not say how many tokens there are; use --vocabulary N, above every id"
            )
        args.vocabulary = least
    if args.vocabulary < least:
        flag, use = f"--vocabulary {args.vocabulary}", f"--vocabulary {least}"
        if model is not None:
            flag = f"--hf {args.hf}: vocab_size {args.vocabulary}"
            use = "a model with a larger vocabulary, or the model's own --tokenizer"
        raise ValueError(f"{flag}: {whose} has {least} different tokens; use {use}")
    if args.eos is not None and not 0 <= args.eos < args.vocabulary:
        raise ValueError(f"--eos {args.eos}: is none of {args.vocabulary} tokens; use --eos {args.vocabulary - 1}")
    data = data_of(args)
    if isinstance(data, Tokens):
        try:
            data.scan()
        except ValueError as error:
            if model is None:
                raise
            use = f"the tokens of the tokenizer of --hf {args.hf}"
            raise ValueError(f"{str(error).partition('; use ')[0]}; use {use}") from None
    data.split(HELD_OUT)
