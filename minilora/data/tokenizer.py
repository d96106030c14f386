"""The tokenizer turns text into whole numbers and back, one number per character.
It exists because a character alphabet needs no training, no files and no surprises, so a lesson about LoRA stays one.
"""

import numpy as np

from ..errors import InputError

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # newline, then printable ASCII: 96 tokens


class CharTokenizer:
    """Characters to token ids and back: id ``i`` stands for ``alphabet[i]``.

    Raises InputError for an alphabet that is empty or repeats a character.
    """

    def __init__(self, alphabet: str = ALPHABET):
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise InputError("the alphabet must hold at least one character, and each only once")
        self.alphabet = alphabet
        self._codes = _code_points(alphabet)
        # One id per code point; -1 marks a stranger, and the spare last slot serves every larger code point.
        self._table = np.full(int(self._codes.max()) + 2, -1, dtype=np.int64)
        self._table[self._codes] = np.arange(len(alphabet))

    @property
    def vocab_size(self) -> int:
        """The number of distinct tokens, V; ids run from 0 to V - 1."""
        return len(self.alphabet)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``: int64, shape (len(text),).

        Raises InputError naming the first character outside the alphabet and its position, counted from 0.
        """
        ids = self._table[np.minimum(_code_points(text), len(self._table) - 1)]
        if (ids < 0).any():
            at = int((ids < 0).argmax())
            raise InputError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the tokenizer's "
                f"{self.vocab_size} characters; read_text_file() maps or replaces such characters"
            )
        return ids

    def decode(self, ids) -> str:
        """The text of ``ids``, whole numbers of any shape, read in order.

        Raises InputError for ids that are not whole numbers or lie outside 0 .. vocab_size - 1.
        """
        ids = np.asarray(ids).ravel()
        if ids.size == 0:
            return ""
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"token ids must be whole numbers, not {ids.dtype}")
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise InputError(f"token id {outside[0]} is outside 0 .. {self.vocab_size - 1}")
        return self._codes[ids].tobytes().decode("utf-32-le")


def _code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character: uint32, shape (len(text),)."""
    # surrogatepass: a broken character should be reported by encode(), not crash here.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
