"""A tokenizer of the readers' own, from the `tokenizer.json` that every published model has. Needs the extra `hf`."""

from codecs import BOM_UTF8
from pathlib import Path

from core.proof.files import check_readable


class Tokenizer:
    """Text to token ids, and back. Of the tokenizer's special tokens it adds none.

    Raises:
        ValueError: the package is not installed, or the file is missing or no tokenizer.
    """

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ValueError(
                f"--tokenizer {path}: needs the package tokenizers; use pip install 'parallelism-lessons[hf]'"
            ) from None
        check_readable(f"--tokenizer {path}", path, "use a model's tokenizer.json")
        try:
            self._fast = Fast.from_buffer(Path(path).read_bytes().removeprefix(BOM_UTF8))
        except Exception as error:  # what the package raises is no class of its own
            raise ValueError(f"--tokenizer {path}: is no tokenizer: {error}; use a model's tokenizer.json") from None

    @property
    def vocabulary(self) -> int:
        """The ids are below it, added tokens' too."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)
