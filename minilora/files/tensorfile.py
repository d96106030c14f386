"""Safetensors files, read with suspicion: nothing in a file is believed before it has been checked.

A file from elsewhere may be damaged or made to do harm. The safetensors library checks the format; this module checks
the rest: a header of bounded size without duplicate names, the tensors that a model expects, finite values, a checksum.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from pathlib import Path

import numpy as np

from ..errors import nearest, shown
from ..gpt import GPT
from .errors import FormatError
from .saving import write_atomically

HEADER_BYTES = 1 << 20  # a header of 100 MB would take 1 GB of memory to read; GPT-2 XL's 580 tensors need 60 KB
DTYPES = ("F64", "F32", "F16", "BF16")  # what a tensor that is read may be; BF16 becomes float32
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # what a method's buffer of indices or codes may be
DIGEST = "sha256"  # the metadata's key for the checksum
LIBRARY = "Error while deserializing header: "  # how the library begins its errors


def parse_json(text: bytes | str, path, what: str, error=FormatError):
    """The JSON in ``text`` as plain data. Raises ``error`` unless it is strict JSON, in UTF-8, with no key twice."""

    def no_duplicates(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise error(path, f"the {what} has the key {shown(key)} twice")
            found[key] = value
        return found

    def no_constant(name):
        raise error(path, f"the {what} holds {name}, which is not JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except FormatError:
        raise
    except RecursionError:
        raise error(path, f"the {what} is nested too deeply") from None
    except ValueError as problem:  # also text that is not UTF-8, and an integer of thousands of digits
        raise error(path, f"the {what} is not JSON ({problem})") from None


def read_bytes(path, most: int, what: str, error=FormatError) -> bytes:
    """At most ``most`` bytes of a regular file. Raises ``error`` for a missing file, another kind, or a larger one."""
    try:
        with open_regular(path, what, error) as file:
            data = file.read(most + 1)
    except OSError as problem:
        raise error(path, f"cannot be read: {problem.strerror}") from None
    if len(data) > most:
        raise error(path, f"is larger than {most:,} bytes, the most that {what} may have")
    return data


def open_regular(path, what: str, error=FormatError):
    """Open a regular file to read; a pipe is refused instead of waited for."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise error(path, f"there is no such file; {what} was expected") from None
    except ValueError:  # a NUL in the path
        raise error(path, "is not a path") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(path, f"is not {what} but a folder, a pipe or a device")
    return os.fdopen(file, "rb")


def refuse_pickle(path: Path, instead: Path, library: str, error) -> None:
    """Raise ``error`` if there is a pickle at ``path`` and no file ``instead``, which ``library`` writes as well."""
    if path.exists() and not instead.exists():
        rule = "is a pickle, which can run any code when it is read; if you trust it, load it with"
        raise error(path, f"{rule} {library}, whose save_pretrained() writes {instead.name}")


class TensorFile:
    """A safetensors file that is known to be well-formed; its arrays are read later, after check().

    ``metadata``: {str: str}; ``tensors``: {name: (dtype, shape)}. Raises ``error``, a FormatError that names the file
    and the rule, if the library refuses the file (an invalid header, a tensor whose bytes do not fit its shape and
    dtype, bytes that overlap or belong to no tensor), if the header is larger than 1 MiB, or has a name twice.
    ``unread``: a function of a name that is true for tensors to pass over; they are not in ``tensors``.
    """

    def __init__(self, path, what="a safetensors file", error=FormatError, unread=lambda name: False):
        self.path, self.what, self.error = Path(path), what, error
        try:
            self.header = self.read_header()
        except OSError as problem:
            self.fail(f"cannot be read: {problem.strerror}")
        with self.open() as file:
            self.metadata = file.metadata() or {}
        self.tensors = {
            name: (entry["dtype"], tuple(entry["shape"]))  # get_slice() takes quadratic time before safetensors 0.7
            for name, entry in self.header.items()
            if name != "__metadata__" and not unread(name)
        }

    def fail(self, rule, tensor=None):
        raise self.error(self.path, rule, tensor)

    def read_header(self) -> dict:
        """The header as JSON. The library reads one of any size, and of a name that occurs twice the last entry."""
        with open_regular(self.path, self.what, self.error) as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size < 8 + length:
                self.fail(
                    f"is not {self.what}, or truncated: the header claims {8 + length:,} bytes, the file has {size:,}"
                )
            if length > HEADER_BYTES:
                self.fail(f"the header has {length:,} bytes; at most {HEADER_BYTES:,} are read")
            header = parse_json(file.read(length), self.path, "header", self.error)
        self.start = 8 + length
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            self.fail(f"is not {self.what}: the header is not a map of maps")
        return header

    @contextlib.contextmanager
    def open(self):
        """The file, opened by the library, which checks the format; its errors become FormatErrors."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                yield file
        except OSError as problem:
            self.fail(f"cannot be read: {problem.strerror or problem}")
        except SafetensorError as problem:
            self.fail(f"is not {self.what}, or damaged or truncated: {str(problem).removeprefix(LIBRARY)}")

    def check(self, shapes: dict, integers=()) -> None:
        """Hold the file to ``shapes`` {name: shape}: those tensors and no others. No array has been read by then.

        ``integers``: the names of the tensors that hold integers.
        """
        for name in self.tensors:
            if name not in shapes:
                self.fail(f"belongs to nothing in this model{nearest(name, shapes.keys() - self.tensors.keys())}", name)
        for name, shape in shapes.items():
            if name not in self.tensors:
                self.fail(f"is missing; the file has {len(self.tensors)} tensors{nearest(name, self.tensors)}", name)
            dtype, found = self.tensors[name]
            kind, allowed = ("integers", INTEGERS) if name in integers else ("weights", DTYPES)
            if dtype not in allowed:
                self.fail(f"its dtype is {shown(str(dtype))}; {kind} are one of {', '.join(allowed)}", name)
            if found != tuple(shape):
                self.fail(f"is {dtype}{shown_shape(found)}; expected {shown_shape(shape)}", name)

    def read(self) -> dict:
        """The arrays by name; BF16 as float32. Raises unless all are finite and as they were written."""
        with self.open() as file:
            arrays = {
                name: self.bfloat16(name) if dtype == "BF16" else file.get_tensor(name)
                for name, (dtype, _) in self.tensors.items()
            }
        for name, array in arrays.items():
            if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
                self.fail("holds NaN or an infinity", name)
        if DIGEST in self.metadata and self.metadata[DIGEST] != digest(arrays, self.metadata):
            self.fail("is damaged: its checksum is not that of its arrays and description")
        return arrays

    def bfloat16(self, name):
        """BF16 is the upper half of a float32; NumPy has no such dtype."""
        shape, offset = self.tensors[name][1], self.start + self.header[name]["data_offsets"][0]
        half = np.fromfile(self.path, "<u2", math.prod(shape), offset=offset)
        return (half.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def write_tensors(path, arrays: dict, metadata: dict) -> None:
    """Write arrays {name: ndarray} and text {key: text} as safetensors, with a checksum of both, all or not at all."""
    write_atomically(path, tensor_bytes(arrays, metadata))


def tensor_bytes(arrays: dict, metadata: dict) -> bytes:
    """The bytes that write_tensors() writes."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return save(arrays, metadata | {DIGEST: digest(arrays, metadata)})


def digest(arrays: dict, metadata: dict) -> str:
    """SHA-256 of the arrays and of the metadata without the checksum itself."""
    total = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != DIGEST)).encode())
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return total.hexdigest()


def shown_shape(shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def require(file: TensorFile, what: str, *keys) -> None:
    """Refuse a file whose description of ``what`` lacks one of ``keys``."""
    for key in keys:
        if key not in file.metadata:
            file.fail(f'the description of the {what} lacks "{key}"')


def described(file: TensorFile, key: str):
    """The JSON that the metadata holds under ``key``, as plain data."""
    return parse_json(file.metadata[key], file.path, key, file.error)


def read_arrays(file: TensorFile, model: GPT, shapes: dict, records: dict | None = None, integers=frozenset()) -> dict:
    """The arrays of ``file``: ``shapes`` {name: shape} in the dtype of ``model``, ``records`` in their own, no others.

    Those of ``shapes`` that are in ``integers`` hold integers, in a dtype of their own. The shapes are compared before
    anything is read. Raises for a value that is too large for the model's dtype.
    """
    file.check(shapes | (records or {}), integers)
    arrays, dtype = file.read(), next(p for _, p in model.named_parameters()).dtype
    for name in shapes.keys() - integers:
        with np.errstate(over="ignore"):
            arrays[name] = arrays[name].astype(dtype, copy=False)
        if not np.isfinite(arrays[name]).all():
            file.fail(f"holds a number that is too large for {dtype}", name)
    return arrays
