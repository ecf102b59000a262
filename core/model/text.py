"""Batches of real text, byte by byte: vocabulary 256, nothing to download. Or by a tokenizer of the reader's own.

The default text is the English help text of CPython itself (`pydoc_data.topics`, about 465 kB).
"""

from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from core.model.seeded import generator
from core.model.tokenizer import Tokenizer
from core.proof.files import check_readable

VOCABULARY = 256


class Text:
    """A text as bytes, or tokens, of which random samples make a batch.

    Args:
        path: a file of the reader's own, or None for CPython's help text.
        sequence: tokens in one sample.
        tokenizer: makes tokens of the text; None: each byte is one.

    Raises:
        ValueError: the file is missing, empty, no text, or shorter than one sample and its shifted target.
    """

    def __init__(self, path: str | None, sequence: int, tokenizer: Tokenizer | None = None):
        self.sequence, self.unit = sequence, "tokens" if tokenizer else "bytes"
        content = _help_text() if path is None else _file(path)
        if tokenizer is None:
            self.tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        else:
            self.tokens = torch.tensor(tokenizer.encode(_decoded(content, path)), dtype=torch.int32)
        if len(self.tokens) < sequence + 1:
            raise ValueError(
                f"--data {path or '(help text)'}: {len(self.tokens)} {self.unit} is too short: a sample of --sequence "
                f"{sequence} and its target need {sequence + 1}; use a longer file or --sequence "
                f"{max(1, len(self.tokens) - 1)}"
            )

    def split(self, share: float) -> tuple["Text", "Text"]:
        """All but the last `share` of the text, to train on, and the rest.

        Raises:
            ValueError: one of them is shorter than a sample and its target.
        """
        end = len(self.tokens) - int(share * len(self.tokens))
        splits = copy(self), copy(self)
        splits[0].tokens, splits[1].tokens = self.tokens[:end], self.tokens[end:]
        if min(len(each.tokens) for each in splits) < self.sequence + 1:
            raise ValueError(
                f"--sequence {self.sequence}: {share:.0%} of the text, {len(splits[1].tokens)} {self.unit}, are kept "
                f"for validation, too few for a sample; use a longer file or --sequence "
                f"{max(1, len(splits[1].tokens) - 1)}"
            )
        return splits

    def batch(self, seed: int, step: int, samples: int, rows: range | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the global batch of `step`, int64 of shape (samples, sequence).

        Depends on (seed, step) alone: every rank of every layout computes the same batch and takes its samples.
        The target of a position is the byte that follows it. `rows` is for `Tokens`, which reads no others.
        """
        last_start = len(self.tokens) - self.sequence
        starts = torch.randint(last_start, (samples, 1), generator=generator(seed, "batch", step))
        window = self.tokens[starts + torch.arange(self.sequence + 1)].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _help_text() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("--data: this Python ships without pydoc_data; use --data FILE with a text file") from None
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _decoded(content: bytes, path: str | None) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: is no text in UTF-8 ({error}), as --tokenizer needs; use another") from None


def _file(path: str) -> bytes:
    check_readable(f"--data {path}", path, "use the path of a readable text file")
    content = Path(path).read_bytes()
    if not content:
        raise ValueError(f"--data {path}: the file is empty; use a text of more than --sequence bytes")
    return content
