"""Files that lie: named ways to make a good safetensors file a bad one, for every loader that must refuse them.

A seed is a function that spoils the file at a path. Most of them know no loader: they break the format itself. The
others rewrite what minilora's own description says and sign it again, so that no checksum can be what catches them.
"""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from minilora.files.tensorfile import DIGEST, digest, tensor_bytes

FIRST, SOME = "the first tensor, whatever its name", "some tensor"
GONE = object()
KILLER = b"cos\nsystem\n(S'touch killed'\ntR."  # a pickle that would run a command


@dataclass(frozen=True)
class Seed:
    """How a file is spoilt, and what the error must say: an expression for its rule, and the tensor at fault."""

    spoil: Callable[[Path], None]
    rule: str
    tensor: str | None = None


# -------------------------------------------------------------------------------- the parts of a file


def read(path):
    """(header as a dict, the bytes of the arrays)."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write(path, header, data: bytes, length=None):
    """``header``: a dict, or the bytes to stand there; ``length``: what the file says that the header has."""
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def first(header) -> str:
    """The name of the first tensor."""
    return next(name for name in header if name != "__metadata__")


def raw(change):
    """A spoil that changes the file's bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def header_text(change):
    """A spoil that changes the header's bytes; its length is told truly."""

    def spoil(path):
        header, data = read(path)
        write(path, change(json.dumps(header).encode()), data)

    return spoil


def entry(**changes):
    """A spoil that changes the first tensor's dtype, shape or data_offsets; GONE takes one away."""

    def spoil(path):
        header, data = read(path)
        found = header[first(header)] | changes
        header[first(header)] = {key: value for key, value in found.items() if value is not GONE}
        write(path, header, data)

    return spoil


def instead(value):
    """A spoil that puts ``value`` in the place of the first tensor's whole entry."""

    def spoil(path):
        header, data = read(path)
        write(path, header | {first(header): value}, data)

    return spoil


def renamed(name):
    def spoil(path):
        header, data = read(path)
        old = first(header)
        write(path, {name if key == old else key: value for key, value in header.items()}, data)

    return spoil


def unsigned(metadata):
    """A spoil that puts this JSON value in the metadata's place."""
    return lambda path: write(path, read(path)[0] | {"__metadata__": metadata}, read(path)[1])


def rewritten(change):
    """A spoil that changes ({name: array}, {key: text}) in place, and signs the file again as a writer would."""

    def spoil(path):
        with safe_open(path, framework="numpy") as file:
            arrays, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        change(arrays, notes)
        path.write_bytes(tensor_bytes(arrays, notes))

    return spoil


def noted(**changes):
    """A spoil that changes the metadata, signed; None takes a key away."""

    def change(arrays, notes):
        notes.update(changes)
        for key, value in changes.items():
            if value is None:
                del notes[key]

    return rewritten(change)


def stored(name, value, dtype, at=0):
    """A spoil that stores the tensor ``name`` as ``dtype``, with ``value`` at the flat index ``at``, signed.

    BF16 is written by hand: it is the upper half of a float32.
    """

    def spoil(path):
        header, data = read(path)
        arrays, tail = {}, b""
        for key in sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"]):
            begin, end = header[key]["data_offsets"]
            array = np.frombuffer(data[begin:end], "<f4").reshape(header[key]["shape"]).copy()
            if key == name:
                with np.errstate(over="ignore"):
                    array = array.astype({"F64": "<f8", "F16": "<f2"}.get(dtype, "<f4"))
                array.flat[at] = value
                header[key]["dtype"] = dtype
            kept = array
            if key == name and dtype == "BF16":
                half = (array.view("<u4") >> 16).astype("<u2")
                kept, array = half, (half.astype(np.uint32) << 16).view(np.float32)
            header[key]["data_offsets"] = [len(tail), len(tail) + kept.nbytes]
            tail += kept.tobytes()
            arrays[key] = array
        if DIGEST in header["__metadata__"]:
            header["__metadata__"][DIGEST] = digest(arrays, header["__metadata__"])
        write(path, header, tail)

    return spoil


# -------------------------------------------------------------------------------- what is no safetensors file at all


def packed(pack):
    """A spoil that writes what ``pack(file object, the good bytes)`` writes."""

    def spoil(path):
        buffer = io.BytesIO()
        pack(buffer, path.read_bytes())
        path.write_bytes(buffer.getvalue())

    return spoil


def tar(mode):
    def pack(buffer, good):
        with tarfile.open(fileobj=buffer, mode=mode) as file:
            member = tarfile.TarInfo("../../etc/passwd")
            member.size = len(good)
            file.addfile(member, io.BytesIO(good))

    return pack


def zipped(buffer, good):
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", KILLER)
        file.writestr("archive/data/0", good)


def replaced(make):
    """A spoil that puts something else in the file's place: make(path) where nothing is."""

    def spoil(path):
        path.unlink()
        make(path)

    return spoil


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


NO_FILE = "is not|announced"
FOREIGN = {
    "empty": raw(lambda b: b""),
    "one byte": raw(lambda b: b"{"),
    "eight zeros": raw(lambda b: bytes(8)),
    "a thousand zeros": raw(lambda b: bytes(1000)),
    "a thousand 0xff": raw(lambda b: b"\xff" * 1000),
    "a pickle": raw(lambda b: KILLER),
    "a pickle of arrays": raw(lambda b: pickle.dumps({"weight": np.ones((2, 2))})),
    "an old .pt file": raw(lambda b: pickle.dumps(0x1950A86A20F9469CFC6C) + KILLER),
    "a new .pt file": packed(zipped),
    "an .npz file": packed(lambda buffer, good: np.savez(buffer, weight=np.ones(3))),
    "an .npy file": packed(lambda buffer, good: np.save(buffer, np.ones(3))),
    "a tar archive": packed(tar("w")),
    "a gzipped tar archive": packed(tar("w:gz")),
    "an HDF5 file": raw(lambda b: b"\x89HDF\r\n\x1a\n" + bytes(512)),
    "a GGUF file": raw(lambda b: b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + bytes(64)),
    "an ELF program": raw(lambda b: b"\x7fELF\x02\x01\x01" + bytes(64)),
    "a shell script": raw(lambda b: b"#!/bin/sh\ntouch killed\n"),
    "an HTML page": raw(lambda b: b"<!DOCTYPE html>\n<html><title>404: not found</title></html>\n"),
    "a git-LFS pointer": raw(
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    ),
    "JSON text": raw(lambda b: json.dumps({"weight": [1.0, 2.0]}).encode()),
    "the good file as text": raw(lambda b: b.hex().encode()),
    "the good file in UTF-16": raw(lambda b: b.decode("latin-1").encode("utf-16")),
    "the good file backwards": raw(lambda b: b[::-1]),
    "the good file without its first byte": raw(lambda b: b[1:]),
    "the good file after a byte": raw(lambda b: b"\0" + b),
    "with Windows' line ends": raw(lambda b: b.replace(b'"', b'"\r\n', 1)),
}
FILES = {
    "missing": (Path.unlink, "there is no such file"),
    "a folder": (replaced(Path.mkdir), "a folder, a pipe or a device"),
    "a pipe that nobody writes to": (replaced(os.mkfifo), "a folder, a pipe or a device"),
    "a socket": (replaced(unix_socket), "cannot be read"),
    "a link to /dev/zero": (replaced(lambda path: path.symlink_to("/dev/zero")), "a folder, a pipe or a device"),
    "a link to /dev/null": (replaced(lambda path: path.symlink_to("/dev/null")), "a folder, a pipe or a device"),
    "a link to a folder": (replaced(lambda path: path.symlink_to("/")), "a folder, a pipe or a device"),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nothing")), "there is no such file"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "cannot be read"),
    "a sparse file of a terabyte": (lambda path: os.truncate(path, 1 << 40), "the tensors take"),
}

# -------------------------------------------------------------------------------- how long the header says that it is


def length(change):
    """A spoil that lies about the header's length: change(length, size of the file)."""

    def spoil(path):
        good = path.read_bytes()
        n = int.from_bytes(good[:8], "little")
        path.write_bytes((change(n, len(good)) % 2**64).to_bytes(8, "little") + good[8:])

    return spoil


SHORT, LIE = "not JSON|no JSON object", "bytes is announced"
LENGTHS = {
    "0": (length(lambda n, size: 0), SHORT),
    "1": (length(lambda n, size: 1), SHORT),
    "half": (length(lambda n, size: n // 2), SHORT),
    "one less": (length(lambda n, size: n - 1), f"{SHORT}|the tensors take"),
    "one more": (length(lambda n, size: n + 1), "not JSON|not UTF-8|the tensors take"),
    "all that follows": (length(lambda n, size: size - 8), "not JSON|not UTF-8"),
    "one more than follows": (length(lambda n, size: size - 7), LIE),
    "the size": (length(lambda n, size: size), LIE),
    "the size and one": (length(lambda n, size: size + 1), LIE),
    "2^20": (length(lambda n, size: 2**20), LIE),
    "2^31": (length(lambda n, size: 2**31), LIE),
    "2^32": (length(lambda n, size: 2**32), LIE),
    "2^32 more": (length(lambda n, size: n + 2**32), LIE),
    "2^63 - 1": (length(lambda n, size: 2**63 - 1), LIE),
    "2^63": (length(lambda n, size: 2**63), LIE),
    "2^64 - 1": (length(lambda n, size: -1), LIE),
    "big-endian": (length(lambda n, size: int.from_bytes(n.to_bytes(8, "little"), "big")), LIE),
}

# -------------------------------------------------------------------------------- the header's text


def in_place_of_first(text: bytes):
    """A spoil that puts raw JSON in the place of the first tensor's entry."""

    def spoil(path):
        header, data = read(path)
        header[first(header)] = "HERE"
        write(path, json.dumps(header).encode().replace(b'"HERE"', text), data)

    return spoil


def twice(change=lambda key: json.dumps(key)):
    """A spoil that names the first tensor a second time, in other letters."""

    def spoil(path):
        header, data = read(path)
        name = first(header)
        again = f"{change(name)}: {json.dumps(header[name])}, "
        write(path, b"{" + again.encode() + json.dumps(header).encode()[1:], data)

    return spoil


def many(count):
    def spoil(path):
        write(path, b"{" + b",".join(b'"%x":0' % i for i in range(count)) + b"}", b"")

    return spoil


def lengthened(text: bytes, size: int):
    return header_text(lambda header: header[:-1] + text * (size // len(text)) + header[-1:])


DEEP = 100_000
TEXTS = {
    "no text": (header_text(lambda h: b""), "no JSON object"),
    "a list": (header_text(lambda h: b"[" + h + b"]"), "no JSON object"),
    "null": (header_text(lambda h: b"null"), "no JSON object"),
    "text": (header_text(lambda h: json.dumps(h.decode()).encode()), "no JSON object"),
    "a space before it": (header_text(lambda h: b" " + h), "no JSON object"),
    "a byte order mark": (header_text(lambda h: b"\xef\xbb\xbf" + h), "no JSON object"),
    "UTF-16": (header_text(lambda h: h.decode().encode("utf-16")), "no JSON object"),
    "UTF-16 without a mark": (header_text(lambda h: h.decode().encode("utf-16-le")), "not JSON"),
    "UTF-32": (header_text(lambda h: h.decode().encode("utf-32-le")), "not JSON"),
    "Latin-1": (header_text(lambda h: h.replace(b'"F32"', b'"F\xfc2"')), "not UTF-8"),
    "a zero in two bytes": (header_text(lambda h: h.replace(b'"F32"', b'"F32\xc0\x80"')), "not UTF-8"),
    "a surrogate in UTF-8": (header_text(lambda h: h.replace(b'"F32"', b'"F32\xed\xa0\x80"')), "not UTF-8"),
    "a line end in a name": (header_text(lambda h: h.replace(b'"F32"', b'"F32\n"')), "not JSON"),
    "a zero in a name": (header_text(lambda h: h.replace(b'"F32"', b'"F32\0"')), "not JSON"),
    "a comma too many": (header_text(lambda h: h[:-1] + b",}"), "not JSON"),
    "a second object": (header_text(lambda h: h + b"{}"), "not JSON"),
    "a zero behind it": (header_text(lambda h: h + b"\0"), "not JSON"),
    "single quotes": (header_text(lambda h: h.replace(b'"', b"'")), "not JSON"),
    "a comment": (header_text(lambda h: h[:1] + b"/* */" + h[1:]), "not JSON"),
    "Python's None": (in_place_of_first(b"None"), "not JSON"),
    "NaN": (in_place_of_first(b"NaN"), "holds NaN"),
    "Infinity": (in_place_of_first(b"Infinity"), "holds Infinity"),
    "-Infinity": (in_place_of_first(b"-Infinity"), "holds -Infinity"),
    "1e999": (in_place_of_first(b"1e999"), "its entry has not exactly"),
    "a hundred thousand brackets": (in_place_of_first(b"[" * DEEP + b"]" * DEEP), "nested too deeply"),
    "brackets that are left open": (in_place_of_first(b"[" * DEEP), "nested too deeply"),
    "a hundred thousand braces": (in_place_of_first(b'{"a":' * DEEP + b"0" + b"}" * DEEP), "nested too deeply"),
    "a number of 100,000 digits": (in_place_of_first(b"9" * 100_000), "a number that is too long"),
    "a number of 4,000 digits": (in_place_of_first(b"9" * 4_000), "its entry has not exactly"),
    "a fraction of 100,000 digits": (in_place_of_first(b"0." + b"9" * 100_000), "its entry has not exactly"),
    "a name twice": (twice(), "twice"),
    "a name twice, once escaped": (twice(lambda key: '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"'), "twice"),
    "metadata twice": (header_text(lambda h: b'{"__metadata__": {}, ' + h[1:]), "twice"),
    "a dtype twice": (header_text(lambda h: h.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1)), "twice"),
    "no tensor": (header_text(lambda h: b"{}"), "the tensors take|metadata|format"),
    "a million names": (many(1_000_000), "the header has"),
    "a hundred thousand names": (many(100_000), "names 100,000 tensors"),
    "a header of two million spaces": (lengthened(b" ", 2_000_000), "the header has"),
}

# -------------------------------------------------------------------------------- one tensor's entry

NUMBERS = "is not a list of integers"
SHAPE = "dimensions or one of 0"
BYTES = "bytes are not what"
HOLE = "leaves a hole"
SHAPES = {
    "none": (None, NUMBERS),
    "an object": ({}, NUMBERS),
    "text": ("2, 8", NUMBERS),
    "a number": (16, NUMBERS),
    "negative": ([-2, 8], NUMBERS),
    "negative twice": ([-2, -8], NUMBERS),
    "-1": ([-1], NUMBERS),
    "2^63": ([2**63], NUMBERS),
    "2^64": ([2**64], NUMBERS),
    "2^64 and the right number": ([2**64 + 16], NUMBERS),
    "1e308": ([1e308], NUMBERS),
    "whole floats": ([2.0, 8.0], NUMBERS),
    "true": ([True, 16], NUMBERS),
    "texts": (["2", "8"], NUMBERS),
    "a list in it": ([[2, 8]], NUMBERS),
    "null in it": ([None, 16], NUMBERS),
    "4,000 digits": ([10**3999], NUMBERS),
    "0": ([0, 8], SHAPE),
    "0 and 2^62": ([0, 2**62], SHAPE),
    "a hundred dimensions": ([2, 8] + [1] * 98, SHAPE),
    "100,000 dimensions": ([1] * 100_000, SHAPE),
    "no dimensions": ([], BYTES),
    "one row less": ([1, 8], BYTES),
    "one row more": ([3, 8], BYTES),
    "2^62": ([2**62], BYTES),
    "eight times 2^62": ([2**62] * 8, BYTES),
    "the right number modulo 2^64": ([2**60 + 1, 16], BYTES),
    "the right bytes modulo 2^64": ([2**62 + 16], BYTES),
}
OFFSETS = {
    "none": (None, NUMBERS),
    "text": ("0, 64", NUMBERS),
    "an object": ({"begin": 0, "end": 64}, NUMBERS),
    "negative": ([-64, 0], NUMBERS),
    "the end negative": ([0, -64], NUMBERS),
    "2^63": ([0, 2**63], NUMBERS),
    "2^64": ([0, 2**64], NUMBERS),
    "beyond 2^64": ([2**64, 2**64 + 64], NUMBERS),
    "whole floats": ([0.0, 64.0], NUMBERS),
    "1e308": ([0, 1e308], NUMBERS),
    "false": ([False, 64], NUMBERS),
    "texts": (["0", "64"], NUMBERS),
    "empty": ([], SHAPE),
    "one": ([64], SHAPE),
    "three": ([0, 64, 64], SHAPE),
    "reversed": ([64, 0], BYTES),
    "one byte less": ([0, 63], BYTES),
    "one byte more": ([0, 65], BYTES),
    "begin one later": ([1, 64], BYTES),
    "no bytes": ([0, 0], BYTES),
    "2^63 - 1": ([0, 2**63 - 1], BYTES),
    "one later": ([1, 65], HOLE),
    "behind the end": ([2**40, 2**40 + 64], HOLE),
    "just below 2^63": ([2**63 - 65, 2**63 - 1], HOLE),
}
DTYPE, KEYS = "its dtype is", "its entry has not exactly"
DTYPES = {
    name: (name, DTYPE)
    for name in [
        *("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"),
        *("F128", "f32", "float32", "<f4", "O", "V"),
    ]
} | {
    "empty": ("", DTYPE),
    "a space": ("F32 ", DTYPE),
    "a zero": ("F32\0", DTYPE),
    "control codes": ("\x1b[2J\x07", DTYPE),
    "an override of direction": ("\u202e23F", DTYPE),
    "a lone surrogate": ("\ud800", DTYPE),
    "very long": ("F" * 100_000, DTYPE),
    "null": (None, DTYPE),
    "a number": (32, DTYPE),
    "true": (True, DTYPE),
    "a list": (["F32"], DTYPE),
    "an object": ({"F32": 1}, DTYPE),
    "half": ("F16", BYTES),
    "bfloat": ("BF16", BYTES),
    "double": ("F64", BYTES),
}
ENTRIES = {
    "null": (instead(None), KEYS),
    "a list": (instead([]), KEYS),
    "text": (instead("F32"), KEYS),
    "a number": (instead(0), KEYS),
    "true": (instead(True), KEYS),
    "empty": (instead({}), KEYS),
    "without dtype": (entry(dtype=GONE), KEYS),
    "without shape": (entry(shape=GONE), KEYS),
    "without offsets": (entry(data_offsets=GONE), KEYS),
    "with more": (entry(requires_grad=True), KEYS),
    "with __class__": (entry(__class__="os.system"), KEYS),
}
NAMES = {
    "an absolute path": "/etc/passwd",
    "a path upwards": "../../etc/passwd",
    "a path upwards with backslashes": "..\\..\\windows\\system.ini",
    "empty": "",
    "a zero": "blocks.0.q\0.arrays.A",
    "a line end": "blocks.0.q.arrays.A\nminilora: all is well",
    "a carriage return": "blocks.0.q.arrays.A\rminilora: all is well",
    "codes that clear the screen": "\x1b[2J\x1b[1;31mroot\x1b[0m",
    "a code that sets the title": "\x1b]0;owned\x07",
    "codes of C1": "\x9b31m\x85\x9d0;owned\x9c",
    "an override of direction": "\u202ea.syarra.q",
    "lone surrogates": "\udfff\ud800",
    "a name of 100,000 letters": "q" * 100_000,
    "a name of 10,000 control codes": "\x01" * 10_000,
    "dunder": "__class__",
    "python": "__import__('os').system('touch killed')",
    "a template": "{0.__class__.__init__.__globals__} %s %n ${HOME} $(touch killed)",
    "a letter that looks alike": "blocks.0.q.arrays.\u0391",
    "other case": "BLOCKS.0.Q.ARRAYS.A",
}


def added(size):
    return lambda path: path.write_bytes(path.read_bytes() + b"\0" * size)


def shifted(first_by=0, others_by=0, fill=b"", cut=0):
    """A spoil that moves the first tensor's offsets, or the others', and the bytes with them."""

    def spoil(path):
        header, data = read(path)
        for name, found in header.items():
            if name != "__metadata__":
                by = first_by if name == first(header) else others_by
                found["data_offsets"] = [n + by for n in found["data_offsets"]]
        end = header[first(header)]["data_offsets"][1] - first_by
        write(path, header, data[:end] + fill + data[end : len(data) - cut])

    return spoil


LAYOUT = {
    "a byte too many": (added(1), "the tensors take"),
    "a kibibyte too many": (added(1024), "the tensors take"),
    "a hole before all": (shifted(8, 8, b"hide you"), HOLE),
    "a hole between two": (shifted(0, 8, b"hide you"), HOLE),
    "two that overlap": (shifted(0, -8, cut=8), "overlaps"),
    "two on the same bytes": (shifted(0, -64, cut=64), "overlaps"),
}


def format_seeds() -> dict[str, Seed]:
    """Seeds that break any safetensors file whose first tensor is 64 bytes of F32 at the front, by name."""
    seeds = {f"foreign: {name}": Seed(spoil, NO_FILE) for name, spoil in FOREIGN.items()}
    seeds |= {f"file: {name}": Seed(*seed) for name, seed in FILES.items()}
    seeds |= {f"header length: {name}": Seed(*seed) for name, seed in LENGTHS.items()}
    seeds |= {f"header: {name}": Seed(*seed) for name, seed in TEXTS.items()}
    seeds |= {f"entry: {name}": Seed(spoil, rule, FIRST) for name, (spoil, rule) in ENTRIES.items()}
    seeds |= {f"shape: {name}": Seed(entry(shape=shape), rule, FIRST) for name, (shape, rule) in SHAPES.items()}
    seeds |= {
        f"offsets: {name}": Seed(entry(data_offsets=at), rule, SOME if rule == HOLE else FIRST)
        for name, (at, rule) in OFFSETS.items()
    }
    seeds |= {f"dtype: {name}": Seed(entry(dtype=dtype), rule, FIRST) for name, (dtype, rule) in DTYPES.items()}
    seeds |= {f"layout: {name}": Seed(*seed) for name, seed in LAYOUT.items()}
    return seeds | {f"name: {name}": Seed(renamed(text), "belongs to nothing", text) for name, text in NAMES.items()}


# -------------------------------------------------------------------------------- what minilora's description says

LONG = "9" * 4_000
METHODS = {
    "os.system": "os.system",
    "an import": "__import__('os')",
    "a path": "../lora",
    "a command": "lora; rm -rf .",
    "a file": "lora.py",
    "a module": "minilora.methods.lora",
    "a package": "methods",
    "a private file": "__init__",
    "other case": "LoRA",
    "a space": "lora ",
    "empty": "",
    "a zero": "lora\0",
    "control codes": "\x1b[2J\nminilora: all is well",
    "very long": "lora" * 20_000,
}
WRONG_METADATA = {
    "null": None,
    "a list": [],
    "text": "minilora adapter 2",
    "a number": 2,
    "true": True,
    "a number in it": {"format": 1},
    "null in it": {"format": None},
    "a list in it": {"format": ["minilora adapter 2"]},
    "an object in it": {"format": {}},
    "empty": {},
    "of 900 KB": {"format": "pt" * 450_000},
    "of 2 MB": {"format": "pt" * 1_000_000},
}


def options(**changes):
    """A spoil that changes the options of every layer, signed."""
    return described(lambda layers: [found["options"].update(changes) for found in layers.values()])


def described(change):
    """A spoil that changes {path: {"options": …}} in place, signed."""

    def change_notes(arrays, notes):
        layers = json.loads(notes["layers"])
        change(layers)
        notes["layers"] = json.dumps(layers)

    return rewritten(change_notes)


def moved(to, path="blocks.0.q"):
    """A spoil that says that the adapter of one layer belongs to another."""
    return described(lambda layers: layers.update({to: layers.pop(path)}))


def parted(part, path="blocks.0.q"):
    return described(lambda layers: layers[path].update(part=part))


def layers_text(text: str):
    return noted(layers=text)


def unsafe_text(text: str):
    """A spoil that puts text into the metadata that no signed file can hold."""

    def spoil(path):
        header, data = read(path)
        header["__metadata__"]["layers"] = text
        write(path, header, data)

    return spoil


OPTIONS = {
    "r of 10^12": ({"r": 10**12}, "below 2³²"),
    "r of 2^63": ({"r": 2**63}, "below 2³²"),
    "r of 4,000 digits": ({"r": int(LONG)}, "r is 9999"),
    "r of one more than fits": ({"r": 9}, "at most 8"),
    "r of 0": ({"r": 0}, "at least 1"),
    "r of -1": ({"r": -1}, "at least 1"),
    "r of -10^12": ({"r": -(10**12)}, "at least 1"),
    "r is true": ({"r": True}, "the rank must be an integer"),
    "r is text": ({"r": "8"}, "the rank must be an integer"),
    "r is null": ({"r": None}, "the rank must be an integer"),
    "r is a float": ({"r": 2.0}, "the rank must be an integer"),
    "r is 1e308": ({"r": 1e308}, "the rank must be an integer"),
    "r is a list": ({"r": [2]}, "the rank must be an integer"),
    "r is an object": ({"r": {"r": 2}}, "the rank must be an integer"),
    "alpha of 0": ({"alpha": 0}, "above 0"),
    "alpha of -1": ({"alpha": -1.0}, "above 0"),
    "alpha is text": ({"alpha": "16"}, "a finite number above 0"),
    "alpha is true": ({"alpha": True}, "a finite number above 0"),
    "alpha is null": ({"alpha": None}, "a finite number above 0"),
    "alpha is a list": ({"alpha": []}, "a finite number above 0"),
    "alpha of 4,000 digits": ({"alpha": int(LONG)}, "a finite number"),
    "a misspelt option": ({"rank": 2}, "no option"),
    "an option name": ({"name": "lora"}, "no option"),
    "an option self": ({"self": 1}, "no option"),
    "an option cls": ({"cls": 1}, "no option"),
    "an option __class__": ({"__class__": "os.system"}, "no option"),
    "an empty option": ({"": 1}, "no option"),
    "an option of control codes": ({"\x1b[2J\n": 1}, "no option"),
    "a very long option": ({"r" * 50_000: 1}, "no option"),
}
LAYERS = {
    "no JSON": ("{", "not JSON"),
    "empty": ("", "not JSON"),
    "a byte order mark": ("\ufeff{}", "not JSON"),
    "an empty list": ("[]", "not a map"),
    "a list of names": ('["blocks.0.q"]', "not a map"),
    "an empty map": ("{}", "not a map"),
    "null": ("null", "not a map"),
    "text": ('"blocks.0.q"', "not a map"),
    "a number": ("1", "not a map"),
    "NaN": ('{"blocks.0.q": NaN}', "holds NaN"),
    "alpha Infinity": ('{"blocks.0.q": {"options": {"r": 2, "alpha": Infinity}}}', "holds Infinity"),
    "alpha 1e999": ('{"blocks.0.q": {"options": {"r": 2, "alpha": 1e999}}}', "finite"),
    "a layer twice": ('{"blocks.0.q": {"options": {}}, "blocks.0.q": {"options": {}}}', "twice"),
    "r twice": ('{"blocks.0.q": {"options": {"r": 2, "r": 1000000000}}}', "twice"),
    "deep": ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    "a long number": ('{"blocks.0.q": ' + "9" * DEEP + "}", "too long"),
    "an entry null": ('{"blocks.0.q": null}', "other keys"),
    "an entry a list": ('{"blocks.0.q": []}', "other keys"),
    "an entry text": ('{"blocks.0.q": "options"}', "other keys"),
    "an entry with more": ('{"blocks.0.q": {"options": {}, "method": "os.system"}}', "other keys"),
    "an entry without options": ('{"blocks.0.q": {}}', "are not a map"),
    "options null": ('{"blocks.0.q": {"options": null}}', "are not a map"),
    "options a list": ('{"blocks.0.q": {"options": [2, 16.0]}}', "are not a map"),
    "options text": ('{"blocks.0.q": {"options": "r=2"}}', "are not a map"),
    "5,000 layers": (json.dumps({f"blocks.{i}.q": {"options": {}} for i in range(5000)}), "no linear layer|at most"),
}
PATHS = {
    "the next block": "blocks.1.q",
    "a negative block": "blocks.-1.q",
    "another spelling": "blocks.00.q",
    "other case": "blocks.0.Q",
    "a block": "blocks.0",
    "the list of blocks": "blocks",
    "a weight": "blocks.0.q.W",
    "a norm": "norm",
    "an embedding": "tokens",
    "a dot at the end": "blocks.0.q.",
    "two dots": "blocks..q",
    "empty": "",
    "dunder": "blocks.0.__class__",
    "__dict__": "__dict__",
    "a path upwards": "../../blocks.0.q",
    "an absolute path": "/etc/passwd",
    "control codes": "\x1b[2J\nminilora: all is well",
    "a zero": "blocks.0.q\0",
    "a lone surrogate": "\ud800",
    "very long": "blocks.0.q" * 5_000,
}
PART, PARTS = (
    "the part of the layer",
    {  # of q in a VeRA file, which has 8 rows of B
        "null": None,
        "a list": [0, 8],
        "one number": {"B": [8]},
        "three numbers": {"B": [0, 8, 1]},
        "texts": {"B": ["0", "8"]},
        "floats": {"B": [0.0, 8.0]},
        "true": {"B": [False, 8]},
        "negative": {"B": [-8, 0]},
        "to the last but one": {"B": [0, -1]},
        "2^31": {"B": [2**31 - 8, 2**31]},
        "2^64": {"B": [0, 2**64]},
        "reversed": {"B": [8, 0]},
        "empty": {"B": [4, 4]},
        "one row less": {"B": [0, 7]},
        "one row": {"B": [0, 1]},
        "one row more": {"B": [0, 9]},
        "of A": {"A": [0, 2]},
        "of a vector": {"b": [0, 8]},
        "of nothing": {"C": [0, 8]},
        "of control codes": {"\x1b[2J": [0, 8]},
        "of __class__": {"__class__": [0, 8]},
    },
)
A, B = "blocks.0.q.arrays.A", "blocks.0.q.arrays.B"


def description_seeds() -> dict[str, Seed]:
    """Seeds for a file of minilora with LoRA (r 2, alpha 16) in blocks.0.q, whose d_in and d_out are 8, by name."""
    seeds = {f"metadata: {name}": Seed(unsigned(value), "metadata|format|header has") for name, value in
             WRONG_METADATA.items()}  # fmt: skip
    seeds |= {f"without {key}": Seed(noted(**{key: None}), "lacks|format") for key in ("format", "base", "method")}
    seeds["without layers"] = Seed(noted(layers=None), 'lacks "layers"')
    seeds |= {
        f"format: {name}": Seed(noted(format=name), "format")
        for name in ("", "pt", "minilora adapter 1", "MINILORA ADAPTER 2", "minilora adapter 2 ", "x" * 10_000)
    }
    seeds |= {
        f"base: {name}": Seed(noted(base=base), "another base model")
        for name, base in {
            "empty": "",
            "zeros": "0" * 64,
            "control codes": "\x1b[2J",
            "very long": "f" * 10_000,
        }.items()
    }
    seeds |= {f"method: {name}": Seed(noted(method=method), "unknown method") for name, method in METHODS.items()}
    seeds |= {f"options: {name}": Seed(options(**values), rule) for name, (values, rule) in OPTIONS.items()}
    seeds |= {f"layers: {name}": Seed(layers_text(text), rule) for name, (text, rule) in LAYERS.items()}
    seeds |= {f"layer: {name}": Seed(moved(path), "no linear layer") for name, path in PATHS.items()}
    seeds |= {f"part of LoRA: {name}": Seed(parted(part), PART) for name, part in PARTS.items()}
    seeds |= {
        "layers: a lone surrogate": Seed(unsafe_text('{"\ud800": {"options": {}}}'), "no linear layer"),
        "method: another": Seed(noted(method="dora"), "is missing", "blocks.0.q.arrays.m"),
        "method: one without rank": Seed(noted(method="full"), "no option"),
        "layer: another that there is": Seed(moved("blocks.0.k"), "belongs to nothing", A),
        "layer: one more that there is": Seed(
            described(lambda layers: layers.update({"blocks.0.k": layers["blocks.0.q"]})), "is missing",
            "blocks.0.k.arrays.A",
        ),
        "options: another r that fits": Seed(options(r=3), r"is F32\(2, 8\); expected \(3, 8\)", A),
        "options: r of 1": Seed(options(r=1), r"is F32\(2, 8\); expected \(1, 8\)", A),
    }  # fmt: skip
    return seeds


def array_seeds(names, dtypes=("F64", "F32", "F16", "BF16")) -> dict[str, Seed]:
    """Seeds with a number that is none in each of the tensors ``names`` {name: how many numbers}, signed."""
    seeds = {}
    for value in (np.nan, np.inf, -np.inf):
        for dtype in dtypes:
            for name, size in names.items():
                for at in {0, size // 2, size - 1}:
                    seed = Seed(stored(name, value, dtype, at), "NaN or an infinity", name)
                    seeds[f"{value} in {dtype} {name}[{at}]"] = seed
    for value in (1e300, -1e300):
        name = next(iter(names))
        seeds[f"{value} for a float32"] = Seed(stored(name, value, "F64", 3), "too large for float32", name)
    return seeds


def tampered_seeds() -> dict[str, Seed]:
    """Seeds that change what the file says, in its own format, and do not sign it again: the checksum's work."""

    def changed(array=None, **notes):
        def spoil(path):
            header, data = read(path)
            header["__metadata__"].update({key: value for key, value in notes.items() if value is not None})
            for key in [key for key, value in notes.items() if value is None]:
                del header["__metadata__"][key]
            write(path, header, array(data) if array else data)

        return spoil

    def exchanged(path):
        header, data = read(path)
        offsets = [header[name].pop("data_offsets") for name in (A, B)]
        for name, at in zip((A, B), reversed(offsets), strict=True):
            header[name]["data_offsets"] = at
        write(path, header, data)

    entry_of_q = '{"blocks.0.q": {"options": {"r": 2, "alpha": %s}}}'
    damaged = {
        "the first bit": changed(lambda data: bytes([data[0] ^ 1]) + data[1:]),
        "the last bit": changed(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "all zeros": changed(lambda data: bytes(len(data))),
        "two tensors exchanged": exchanged,
        "a larger alpha": changed(layers=entry_of_q % "17.0"),
        "alpha in other digits": changed(layers=entry_of_q % "16.00"),
        "another method of the same shapes": changed(method="rslora"),
        "a note more": changed(note="trust me"),
        "checksum empty": changed(sha256=""),
        "checksum of another file": changed(sha256="0" * 64),
    }
    seeds = {f"tampered: {name}": Seed(spoil, "is damaged") for name, spoil in damaged.items()}
    for name, spoil in {
        "no checksum": changed(sha256=None),
        "no checksum and other numbers": changed(lambda data: bytes(len(data)), sha256=None),
    }.items():
        seeds[f"tampered: {name}"] = Seed(spoil, "sha256")
    return seeds


def model_seeds(good: dict) -> dict[str, Seed]:
    """Seeds for a model whose configuration is ``good``: one block of width 8, of 18 tensors."""
    config = lambda **sizes: noted(config=json.dumps({k: v for k, v in {**good, **sizes}.items() if v is not GONE}))
    huge = 10**9
    seeds = {
        "no configuration": (noted(config=None), 'lacks "config"'),
        "no JSON": (noted(config="{"), "is not JSON"),
        "a list": (noted(config="[1]"), "no usable config"),
        "text": (noted(config='"n_embd"'), "no usable config"),
        "null": (noted(config="null"), "no usable config"),
        "nested": (noted(config="[" * DEEP), "nested too deeply"),
        "a key twice": (noted(config='{"n_embd": 8, "n_embd": 8}'), "twice"),
        "an unknown key": (config(n_heads=2), "no usable config"),
        "a size of 0": (config(n_head=0), "n_head is 0"),
        "a size of text": (config(n_embd="8"), "n_embd is '8'"),
        "a size with a point": (config(n_embd=8.0), "n_embd is 8.0"),
        "a size below 0": (config(n_layer=-1), "n_layer is -1"),
        "a size of 4,000 digits": (noted(config='{"n_embd": ' + LONG + "}"), "n_embd|too long"),
        "control codes": (config(n_embd="\x1b[2J"), "n_embd is"),
        "dropout of text": (config(dropout="0"), "no usable config"),
        "dropout of 2": (config(dropout=2), "dropout is 2"),
        "NaN": (config(dropout=float("nan")), "NaN"),
        "heads that do not fit": (config(n_head=3), "not a multiple"),
        "a billion layers": (config(n_layer=huge), "1,000,000,000 layers"),
        "two layers": (config(n_layer=2), "is missing", "blocks.1.norm1.g"),
        "a width of a billion": (config(n_embd=2 * huge), "expected", "tokens"),
        "a billion positions": (config(n_positions=huge), "expected", "positions"),
        "a billion tokens": (config(vocab_size=huge), "expected", "tokens"),
        "the default sizes": (noted(config="{}"), "expected", "tokens"),
    }
    seeds = {f"config: {name}": Seed(*seed) for name, seed in seeds.items()}
    for name in ("", "pt", "minilora model 2", "minilora adapter 2", "MINILORA MODEL 1", "x" * 10_000):
        seeds[f"format: {name[:20]}"] = Seed(noted(format=name), "is no model")
    seeds["without format"] = Seed(noted(format=None), "is no model")
    seeds["without checksum"] = Seed(
        lambda path: write(path, without_checksum(read(path)[0]), read(path)[1]), f'lacks "{DIGEST}"'
    )
    return seeds


def without_checksum(header):
    return header | {"__metadata__": {k: v for k, v in header["__metadata__"].items() if k != DIGEST}}


def vera_seeds() -> dict[str, Seed]:
    """Seeds for a file of minilora with VeRA (r 2) in blocks.0.q (d_out 8) and blocks.0.up (d_out 32), by name."""
    seeds = {f"part: {name}": Seed(parted(part), PART) for name, part in PARTS.items()}

    def uneven(layers, r):
        layers["blocks.0.up"]["options"]["r"] = r

    d = "blocks.0.q.arrays.d"
    return seeds | {
        "part: rows that the file does not have": Seed(parted({"B": [40, 48]}), "expected", "shared.B"),
        "part: of 2^31 rows": Seed(parted({"B": [2**31 - 9, 2**31 - 1]}), "expected", "shared.B"),
        "VeRA: r of a billion": Seed(options(r=10**9), "expected", d),
        "VeRA: r of 10^18": Seed(options(r=10**18), "below 2³²"),
        "VeRA: r of 10^100": Seed(options(r=10**100), "below 2³²"),
        "VeRA: r of 3": Seed(options(r=3), "expected", d),
        "VeRA: the last layer's r a billion": Seed(described(lambda layers: uneven(layers, 10**9)), "share"),
        "VeRA: the last layer's r 3": Seed(described(lambda layers: uneven(layers, 3)), "share"),
        "VeRA: d_initial of 0": Seed(options(d_initial=0), "above 0"),
        "VeRA: a key of -1": Seed(options(projection_prng_key=-1), "at least 0"),
        "VeRA: a key of 2^32": Seed(options(projection_prng_key=2**32), "projection_prng_key"),
        "VeRA: a key of 10^30": Seed(options(projection_prng_key=10**30), "projection_prng_key"),
        "VeRA: a key that is text": Seed(options(projection_prng_key="0"), "projection_prng_key"),
    }


# -------------------------------------------------------------------------------- every byte


def cuts(good: bytes) -> dict[str, bytes]:
    """Every length that the file could have been cut to up to the arrays, and every eighth byte of these."""
    end = 8 + int.from_bytes(good[:8], "little")
    return {f"cut to {n} bytes": good[:n] for n in [*range(end + 1), *range(end, len(good), 8), len(good) - 1]}


def flips(good: bytes) -> dict[str, bytes]:
    """Each bit of each byte of the length and the header, turned, and all; one bit of each byte of the arrays."""
    end = 8 + int.from_bytes(good[:8], "little")
    masks = [(at, mask) for at in range(end) for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255)]
    masks += [(at, 1 << at % 8) for at in range(end, len(good))]
    return {f"byte {at} ^ {mask:#x}": good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at, mask in masks}


def remove(path):
    """Take away whatever lies at ``path``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
