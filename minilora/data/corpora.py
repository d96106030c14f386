"""The texts a model learns from: two editions of Shakespeare, two lists of names, or a file of the reader's own.
They exist here so that every lesson runs offline, on text whose every byte is known by its checksum.
"""

import gzip
import hashlib
import unicodedata
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import InputError, nearest
from .tokenizer import ALPHABET

# SHA-256 of each text as its ASCII bytes, uncompressed: gzip's own bytes may change with the zlib that wrote them.
CHECKSUMS = {
    "modern_train": "1417e04e295541e006c950b6baaafc51345d97abb9e7e54abb38d604908dea3e",
    "modern_val": "c17884bdcbf2fc28556facb8418059f6b7a4bdaaf76980dd12179867fc524adf",
    "folio_train": "52ea87850627cf8934faf7a19ff43405e135b7ae847097c99ae54a52f603c984",
    "folio_val": "dac4569b1701b2d6b8e25fe281b7ad1971f00506cd6f273aa858eeb6049b8810",
    "names_female": "404c310676c99fa66e15fb747ca48cac28d5105390edb815d3f9b2b274218266",
    "names_male": "53c96f3cff6afe7cd71b8e088d758a75a2a90e04c9eacabe624fb33850bd0f57",
}
CORPORA = ("modern", "folio", "names_female", "names_male")

# What NFKD cannot take apart. The shipped plays write a dash as "--", so an em dash becomes that too.
TYPOGRAPHIC = {
    **dict.fromkeys("‘’‚‛‹›ʼ′´", "'"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‐‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\xad", ""),  # zero-width marks and the soft hyphen
    **dict.fromkeys("\f\v\x85\u2028\u2029", "\n"),
    **{"\t": "    ", "⁄": "/", "•": "*", "ı": "i", "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"},
    **{"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th"},
}


@dataclass(frozen=True)
class Corpus:
    """One text in two parts: ``train`` to learn from, ``val`` held out to measure on. Both are plain ASCII."""

    name: str
    train: str
    val: str


def sha256(text: str) -> str:
    """The SHA-256 of ``text`` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_text(name: str) -> str:
    """One shipped text, such as "modern_train", proved against its checksum.

    Raises InputError for an unknown name, and for a file that is missing or damaged.
    """
    if name not in CHECKSUMS:
        raise InputError(f'no shipped text "{name}"{nearest(name, CHECKSUMS)}; there are: {", ".join(CHECKSUMS)}')
    try:
        text = unpack(resources.files("minilora.data").joinpath(f"{name}.txt.gz").read_bytes())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"the shipped file {name}.txt.gz cannot be read ({error}); install minilora again") from error
    if sha256(text) != CHECKSUMS[name]:
        raise InputError(f"the shipped file {name}.txt.gz does not match its checksum; install minilora again")
    return text


def unpack(raw: bytes) -> str:
    """The text in the bytes of a .txt.gz file."""
    return gzip.decompress(raw).decode("ascii")


def load_corpus(name: str) -> Corpus:
    """A shipped corpus. "modern" and "folio" hold out a whole play, Macbeth; the name lists every tenth name.

    Raises InputError for an unknown name.
    """
    if name not in CORPORA:
        raise InputError(f'no corpus "{name}"{nearest(name, CORPORA)}; there are: {", ".join(CORPORA)}')
    if not name.startswith("names"):
        return Corpus(name, load_text(f"{name}_train"), load_text(f"{name}_val"))
    lines = load_text(name).splitlines(keepends=True)
    val = lines[9::10]
    del lines[9::10]
    return Corpus(name, "".join(lines), "".join(val))


def split_text(text: str, val_fraction: float = 0.1) -> Corpus:
    """``text`` with its end held out: the last ``val_fraction`` of its characters become ``val``.

    The end, not a random choice of lines: neighbouring lines share phrases, and a model must not be graded on those.
    Raises InputError when either part would be empty.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
    cut = len(text) - round(len(text) * val_fraction)
    if not 0 < cut < len(text):
        raise InputError(f"{len(text)} characters are too few to hold out {val_fraction:g} of them; give a longer text")
    return Corpus("text", text[:cut], text[cut:])


def read_text_file(path, replace: str | None = None) -> str:
    """The reader's own UTF-8 text file as plain text in the tokenizer's alphabet, lines ending in newlines.

    Quotes, dashes, accents, tabs and the like are mapped to ASCII. A character with no such form is replaced by
    ``replace``; without one, InputError names up to five of them with code point and line. InputError also for a
    file that is missing, a folder, not UTF-8 or without text, and for a ``replace`` outside the alphabet.
    """
    if replace is not None and not set(replace) <= set(ALPHABET):
        raise InputError(f"the replacement {replace!r} is itself outside the tokenizer's alphabet; use plain ASCII")
    text = _read_utf8(Path(path))
    plain = {char: _plain(char) for char in set(text) - set(ALPHABET)}
    unknown = sorted((char for char in plain if plain[char] is None), key=text.index)
    if unknown and replace is None:
        lines = [text.count("\n", 0, text.index(char)) + 1 for char in unknown[:5]]
        named = ", ".join(f"{c!r} (U+{ord(c):04X}, line {line})" for c, line in zip(unknown, lines, strict=False))
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise InputError(
            f"{path} has characters outside the tokenizer's alphabet: {named}{more}; "
            'replace them with --replace-unknown "?" (in Python, replace="?")'
        )
    return text.translate({ord(char): replace if form is None else form for char, form in plain.items()})


def _read_utf8(path: Path) -> str:
    """The file's text with universal newlines and no byte order mark; InputError says why it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(f"{path} is not UTF-8 (byte 0x{byte:02X} on line {line}); save it as UTF-8") from error
    except OSError as error:
        reason = "it is a folder, not a text file" if path.is_dir() else error.strerror
        raise InputError(f"cannot read {path}: {reason}") from error
    if not text.strip():
        raise InputError(f"{path} is empty: it holds no text to learn from")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(char: str) -> str | None:
    """The ASCII form of one character, perhaps several characters or none; None where there is no such form."""
    # NFKD takes "é" apart into "e" and an accent, "…" into three dots and a no-break space into a space.
    parts = unicodedata.normalize("NFKD", TYPOGRAPHIC.get(char, char))
    form = "".join(TYPOGRAPHIC.get(part, part) for part in parts if not unicodedata.combining(part))
    return form if set(form) <= set(ALPHABET) else None
