"""Bytes on a disk: saves that are never half done, and safetensors files of which nothing is believed unchecked.

Weights are hours of work, and a file from elsewhere may be damaged or made to do harm; both are met here, once.
"""

import hashlib
import json
import math
import os
import stat
from pathlib import Path

import numpy as np

from ..errors import FormatError, nearest, shown
from ..gpt import GPT
from .saving import write_atomically

HEADER_BYTES, TENSORS = 1 << 20, 10_000  # caps on a file's header; GPT-2 XL has 580 tensors and needs 60 KB
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that weights have
MASK_BYTES = {"BOOL": 1, "U8": 1}  # and those that only a tensor which is not read may have
DIGEST = "sha256"  # the metadata's key for the checksum


def parse_json(text: bytes | str, path, what: str, error=FormatError):
    """The JSON in ``text`` as plain data. Raises ``error`` for text that is no strict JSON, and for a key twice."""

    def no_duplicates(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise error(path, f"the {what} has the key {shown(twice)} twice")
        return found

    def no_constant(name):
        raise error(path, f"the {what} holds {name}, which is not JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except FormatError:
        raise
    except UnicodeDecodeError as problem:
        raise error(path, f"the {what} is not UTF-8 (byte {problem.start})") from None
    except json.JSONDecodeError as problem:
        raise error(path, f"the {what} is not JSON ({problem})") from None
    except RecursionError:
        raise error(path, f"the {what} is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise error(path, f"the {what} holds a number that is too long") from None


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


class TensorFile:
    """A safetensors file whose header has been checked, and whose arrays are read one by one after check().

    ``metadata``: {str: str}; ``tensors``: {name: (dtype, shape, offset in the file)}. Raises ``error``, a FormatError,
    that names file, tensor and rule, for anything that the format does not allow, a header above 1 MiB or more than
    10,000 tensors, before any array is read: https://github.com/huggingface/safetensors, section "Format". ``unread``:
    a function of a name that is true of tensors to pass over; they must lie in the file as the format says, and are not
    in ``tensors``.
    """

    def __init__(self, path, what="a safetensors file", error=FormatError, unread=lambda name: False):
        self.path, self.what, self.error, self.unread = Path(path), what, error, unread
        try:
            with open_regular(path, what, error) as file:
                size = os.fstat(file.fileno()).st_size
                header = self.read_header(file, size)
        except OSError as problem:
            raise error(path, f"cannot be read: {problem.strerror}") from None
        entries = parse_json(header, path, "header", error)
        self.metadata = self.check_metadata(entries.pop("__metadata__", {}))
        if len(entries) > TENSORS:
            raise error(path, f"the header names {len(entries):,} tensors; at most {TENSORS:,} are read")
        self.start = 8 + len(header)
        self.tensors = {name: self.check_entry(name, entry) for name, entry in entries.items()}
        self.check_layout(size - self.start)
        self.tensors = {name: entry for name, entry in self.tensors.items() if not unread(name)}

    def fail(self, rule, tensor=None):
        raise self.error(self.path, rule, tensor)

    def read_header(self, file, size) -> bytes:
        first = file.read(8)
        if len(first) < 8:
            self.fail(f"is not {self.what}: it has {size} bytes, and the length of the header alone takes 8")
        length = int.from_bytes(first, "little")
        if length > size - 8:
            self.fail(f"is not {self.what}: a header of {length:,} bytes is announced, and {size - 8:,} bytes follow")
        if length > HEADER_BYTES:
            self.fail(f"the header has {length:,} bytes; at most {HEADER_BYTES:,} are read")
        header = file.read(length)
        if header[:1] != b"{":
            self.fail(f"is not {self.what}: the header is no JSON object")
        return header

    def check_metadata(self, metadata) -> dict:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("__metadata__ is not a map of text to text")
        return metadata

    def check_entry(self, name, entry):
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self.fail("its entry has not exactly dtype, shape and data_offsets", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        item_bytes = ITEM_BYTES | (MASK_BYTES if self.unread(name) else {})
        if not isinstance(dtype, str) or dtype not in item_bytes:
            found = shown(dtype) if isinstance(dtype, str) else f"no text but {type(dtype).__name__}"
            self.fail(f"its dtype is {found}; weights are one of {', '.join(item_bytes)}", name)
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                self.fail(f"its {what} is not a list of integers of at least 0 and below 2⁶³", name)
        if len(shape) > 8 or 0 in shape or len(offsets) != 2:
            self.fail("its shape has more than 8 dimensions or one of 0, or data_offsets are not two", name)
        begin, end = offsets
        if end - begin != math.prod(shape) * item_bytes[dtype]:
            self.fail(f"its {end - begin:,} bytes are not what {dtype}{shown_shape(shape)} takes", name)
        return dtype, tuple(shape), self.start + begin

    def check_layout(self, size) -> None:
        """The arrays lie one behind the other and fill the file: no hole that hides bytes, none that two share."""
        position = 0
        order = sorted(self.tensors, key=lambda name: (self.tensors[name][2], self.nbytes(name)))
        for name in order:
            begin = self.tensors[name][2] - self.start
            if begin != position:
                what = "leaves a hole behind" if begin > position else "overlaps"
                self.fail(
                    f"it begins at byte {begin:,} and {what} the tensor before it, which ends at {position:,}", name
                )
            position += self.nbytes(name)
        if position != size:
            self.fail(f"the tensors take {position:,} bytes, and the file has {size:,} for them")

    def nbytes(self, name) -> int:
        dtype, shape, _ = self.tensors[name]
        return math.prod(shape) * (ITEM_BYTES | MASK_BYTES)[dtype]

    def check(self, shapes: dict) -> None:
        """Hold the file to ``shapes`` {name: shape}: those tensors and no others. Nothing has been read by then."""
        for name in self.tensors:
            if name not in shapes:
                self.fail(f"belongs to nothing in this model{nearest(name, shapes.keys() - self.tensors.keys())}", name)
        for name, shape in shapes.items():
            if name not in self.tensors:
                self.fail(f"is missing; the file has {len(self.tensors)} tensors{nearest(name, self.tensors)}", name)
            dtype, found, _ = self.tensors[name]
            if found != tuple(shape):
                self.fail(f"is {dtype}{shown_shape(found)}; expected {shown_shape(shape)}", name)

    def read(self) -> dict:
        """The arrays by name; BF16 as float32. Raises for one that is not finite, or not what was written."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                get = lambda name: self.bfloat16(name) if self.tensors[name][0] == "BF16" else file.get_tensor(name)
                arrays = {name: get(name) for name in self.tensors}
        except (SafetensorError, OSError) as problem:
            self.fail(f"is not {self.what}: {problem}")
        for name, array in arrays.items():
            if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
                self.fail("holds NaN or an infinity", name)
        if DIGEST in self.metadata and self.metadata[DIGEST] != digest(arrays, self.metadata):
            self.fail("is damaged: its arrays and description have not the checksum that was written with them")
        return arrays

    def bfloat16(self, name):
        """BF16 is the upper half of a float32; NumPy has no such dtype."""
        _, shape, offset = self.tensors[name]
        half = np.fromfile(self.path, "<u2", math.prod(shape), offset=offset)
        return (half.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def write_tensors(path, arrays: dict, metadata: dict) -> None:
    """Write arrays {name: ndarray} and text {key: text} as safetensors, with a checksum of both, all or not at all."""
    write_atomically(path, tensor_bytes(arrays, metadata))


def tensor_bytes(arrays: dict, metadata: dict) -> bytes:
    """What write_tensors() writes."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(arrays, metadata | {DIGEST: digest(arrays, metadata)})


def digest(arrays: dict, metadata: dict) -> str:
    """SHA-256 of arrays and metadata, itself left out."""
    total = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != DIGEST)).encode())
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return total.hexdigest()


def shown_shape(shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def require(file: TensorFile, what: str, *keys) -> None:
    """Refuse a file whose description of ``what`` has not all ``keys``."""
    for key in keys:
        if key not in file.metadata:
            file.fail(f'the description of the {what} lacks "{key}"')


def described(file: TensorFile, key: str):
    return parse_json(file.metadata[key], file.path, key, file.error)


def read_arrays(file: TensorFile, model: GPT, shapes: dict, records: dict | None = None) -> dict:
    """The arrays {name: shape} of ``file``, all that it has: ``shapes`` in the model's dtype, ``records`` in theirs.

    Nothing is read before the shapes are right. A number of a wider dtype may be too large for the model's.
    """
    file.check(shapes | (records or {}))
    arrays, dtype = file.read(), next(p for _, p in model.named_parameters()).dtype
    for name in shapes:
        with np.errstate(over="ignore"):
            arrays[name] = arrays[name].astype(dtype, copy=False)
        if not np.isfinite(arrays[name]).all():
            file.fail(f"holds a number that is too large for {dtype}", name)
    return arrays
