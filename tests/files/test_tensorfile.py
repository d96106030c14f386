"""Saves are all or nothing, and readers believe nothing, call by call; hostile.py has the bad files.

These tests exist because what a save does in the wrong order is seen only after a power cut.
"""

import errno
import os
import re
import resource
import signal
import struct
import time

import numpy as np
import pytest
from runs import run_in_a_child
from safetensors.numpy import save_file

from minilora.errors import InputError, shown
from minilora.files import saving, tensorfile
from minilora.files.errors import FormatError
from minilora.files.saving import STALE, writable_folder, write_atomically, write_together
from minilora.files.tensorfile import HEADER_BYTES, TensorFile, digest, parse_json, read_bytes, write_tensors

CALLS = ("open", "write", "fsync", "close", "replace")


class Watched:
    """The module os as saving.py sees it: its CALLS by (name, path) in ``seen``; ``before(number)`` may raise."""

    def __init__(self, before=lambda number: None, most=1 << 30):
        self.before, self.most, self.seen, self.paths = before, most, [], {}

    def __getattr__(self, name):
        real = getattr(os, name)
        return real if name not in CALLS else lambda *args: self.call(name, real, *args)

    def call(self, name, real, target, *args):
        self.seen.append((name, self.paths.get(target, target)))
        self.before(len(self.seen) - 1)
        if name == "write":
            return real(target, args[0][: self.most])
        result = real(target, *args)
        if name == "open":
            self.paths[result] = target
        return result


def failing(number, error):
    """A function that raises ``error`` at the call ``number``."""

    def before(count):
        if count == number:
            raise error

    return before


def watch(monkeypatch, *args, **options):
    watched = Watched(*args, **options)
    monkeypatch.setattr(saving, "os", watched)
    return watched


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ saves


def test_bytes_are_on_the_disk_before_they_have_the_name_and_then_the_name_is(tmp_path, monkeypatch):
    path, temporary = tmp_path / "weights", tmp_path / f".weights.{os.getpid()}.minilora"
    watched = watch(monkeypatch)
    write_atomically(path, b"new")
    assert [call for call in watched.seen if call[0] != "close"] == [
        ("open", temporary), ("write", temporary), ("fsync", temporary), ("replace", temporary),
        ("open", tmp_path), ("fsync", tmp_path),
    ]  # fmt: skip
    assert path.read_bytes() == b"new" and names(tmp_path) == ["weights"]


def test_new_folders_are_on_the_disk_too(tmp_path, monkeypatch):
    watched = watch(monkeypatch)
    writable_folder(tmp_path / "a" / "b")
    assert [path for name, path in watched.seen if name == "fsync"] == [tmp_path / "a", tmp_path]


def test_a_write_that_takes_a_part_is_followed_by_another(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(2000)
    watched = watch(monkeypatch, most=7)
    write_atomically(tmp_path / "weights", data)
    assert (tmp_path / "weights").read_bytes() == data
    assert [name for name, _ in watched.seen].count("write") == -(-2000 // 7)
    watch(monkeypatch, failing(9, OSError(errno.ENOSPC, "No space left on device")), most=7)  # full after some parts
    with pytest.raises(InputError, match="No space left on device; no file there is half written"):
        write_atomically(tmp_path / "weights", b"new" * 500)
    assert (tmp_path / "weights").read_bytes() == data and names(tmp_path) == ["weights"]


@pytest.mark.parametrize("number", range(13))
def test_a_call_that_fails_is_one_error_and_all_files_are_whole(number, tmp_path, monkeypatch):
    """Files that belong together are all on the disk before one is renamed."""
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(b"old")
    code = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS][number % 4]
    watched = watch(monkeypatch, failing(number, OSError(code, os.strerror(code))))
    with pytest.raises(InputError, match=f'cannot write ".*": {os.strerror(code)}; no file there is half written'):
        write_together({one: b"new", two: b"new"})
    renamed = max(0, min(number - 8, 2))  # four calls put each file on the disk; then come the renames
    assert [path.read_bytes() for path in (one, two)] == [b"new"] * renamed + [b"old"] * (2 - renamed)
    assert names(tmp_path) == ["one", "two"] and len(watched.seen) > number


def test_a_link_that_waits_under_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".weights.{os.getpid()}.minilora").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "weights", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious" and (tmp_path / "weights").read_bytes() == b"new"
    assert not (tmp_path / "weights").is_symlink()


def test_what_a_killed_save_left_hurts_nothing_and_goes_an_hour_later(tmp_path):
    """And the files of others stay, however old and however like one of ours."""
    path, others = tmp_path / "weights", ["notes.minilora", ".a.12.tmp", ".a.12.minilora.txt", ".a.b.minilora"]
    for name in ["weights", *others]:
        (tmp_path / name).write_bytes(b"old")
        os.utime(tmp_path / name, (0, 0))

    def killed():
        saving.os = Watched(lambda number: number == 2 and os.kill(os.getpid(), signal.SIGKILL))
        write_atomically(path, b"new")

    assert run_in_a_child(killed) == -signal.SIGKILL
    (left,) = set(names(tmp_path)) - {"weights", *others}
    assert path.read_bytes() == b"old" and (tmp_path / left).read_bytes() == b"new"
    writable_folder(tmp_path)  # it could belong to a save that is running
    write_atomically(path, b"newer")
    assert names(tmp_path) == sorted([left, "weights", *others]) and path.read_bytes() == b"newer"
    os.utime(tmp_path / left, (0, time.time() - STALE - 1))
    writable_folder(tmp_path)
    assert names(tmp_path) == sorted(["weights", *others])


def test_of_two_processes_that_save_the_same_file_the_last_one_wins(tmp_path, monkeypatch):
    """The other one saves while this one is between two of its calls: each file that has the name is whole."""
    path = tmp_path / "weights"
    for number in range(8):

        def other(count, number=number):
            if count == number:
                assert run_in_a_child(lambda: (setattr(saving, "os", os), write_atomically(path, b"theirs"))) == 0
                assert path.read_bytes() == b"theirs"

        watch(monkeypatch, other)
        write_atomically(path, b"ours, which is longer")
        assert path.read_bytes() == (b"ours, which is longer" if number <= 4 else b"theirs")
        assert names(tmp_path) == ["weights"]


# ------------------------------------------------------------------------------------------------ JSON and bytes


@pytest.mark.parametrize(
    ("text", "rule"),
    [(b'{"a": "\xff"}', "not JSON .*utf-8"), (b'{"a": [Infinity]}', "holds Infinity, which is not JSON"),
     (b'[{"a\\u001b": 1, "a\\u001b": 2}]', r'has the key "a\\u001b" twice'), (b"9" * 10_000, "not JSON .*digits"),
     (b"[" * 100_000, "nested too deeply")],
    ids=range(5),
)  # fmt: skip
def test_json_that_is_not_strict_is_one_error(text, rule):
    with pytest.raises(FormatError, match=f"the options .*{rule}") as caught:
        parse_json(text, "file", "options")
    assert caught.value.file == "file" and caught.value.tensor is None


@pytest.mark.parametrize("path", ["a\0b", "n" * 5000, "\ud800"])
def test_a_path_that_no_file_can_have_is_one_error(path):
    for read in (TensorFile, lambda path: read_bytes(path, 1, "a file")):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "quoted", "plain"),
    [
        ('say "é"', '"say \\"é\\""', 'say "é"'),
        ("\x1b[2J\n\x7f\ud800\u202e", '"\\u001b[2J\\n\\u007f\\ud800\\u202e"', "\\u001b[2J\\n\\u007f\\ud800\\u202e"),
        ("\0" * 10**6, '"' + ("\\u0000" * 14)[:79] + '…"', ("\\u0000" * 60)[:359] + "…"),
    ],
    ids=["quotes", "control codes", "long and unprintable"],
)
def test_an_error_shows_what_a_file_says_in_letters_and_briefly(text, quoted, plain):
    error = FormatError("file", text, tensor=text)
    assert shown(text) == quoted and error.rule == plain
    assert str(error) == f'"file": tensor {quoted}: {plain}'


# ------------------------------------------------------------------------------------------------ safetensors

VALUES = np.array([[1.5, -2.0, 0.0], [0.1, 65504.0, -1e-7]])


@pytest.mark.parametrize(("name", "dtype"), [("F64", np.float64), ("F32", np.float32), ("F16", np.float16)])
def test_what_is_written_is_read_to_the_bit_and_carries_a_checksum(name, dtype, tmp_path):
    a = VALUES.astype(dtype)
    arrays = {"a": a, "not contiguous": a.T, "scalar": np.array(3.0, dtype), "deep": np.ones((1,) * 8, dtype)}
    write_tensors(tmp_path / "file", arrays, {"note": "é\n"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata["note"] == "é\n" and re.fullmatch("[0-9a-f]{64}", file.metadata[tensorfile.DIGEST])
    assert file.tensors == {key: (name, array.shape) for key, array in arrays.items()}
    file.check({key: array.shape for key, array in arrays.items()})
    found = file.read()
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].dtype == dtype and np.array_equal(found[key], array)


def by_hand(path, *tensors):
    """A file of (name, dtype, shape, bytes), one behind the other."""
    entries, data = [], b""
    for name, dtype, shape, raw in tensors:
        offsets = [len(data), len(data) + len(raw)]
        entries.append(f'"{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}')
        data += raw
    header = f"{{{', '.join(entries)}}}".encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    """Between two of other dtypes, at an offset that is no multiple of four."""
    bits = [0x3FC0, 0xC000, 0x0000, 0x8000, 0x7F7F, 0x0001, 0x3DCD]  # 0x3DCD: 0.1, rounded
    values = [1.5, -2.0, 0.0, -0.0, 2.0**128 - 2.0**120, 2.0**-133, 0.10009765625]
    half, double = np.array([0.5], "<f2"), np.array([0.1], "<f8")
    by_hand(
        tmp_path / "file",
        ("half", "F16", [1], half.tobytes()),
        ("b", "BF16", [7, 1], np.array(bits, "<u2").tobytes()),
        ("double", "F64", [1], double.tobytes()),
    )
    found = TensorFile(tmp_path / "file").read()
    assert found["b"].dtype == np.float32 and found["b"].shape == (7, 1)
    assert found["b"].ravel().tolist() == values and np.signbit(found["b"][3, 0])
    assert found["half"].tobytes() == half.tobytes() and found["double"].tobytes() == double.tobytes()


def test_the_checksum_covers_names_shapes_dtypes_numbers_and_notes():
    zeros = np.zeros((2, 3), np.float32)
    cases = [
        ({"a": zeros}, {"note": "x"}), ({"b": zeros}, {"note": "x"}), ({"a": zeros.T}, {"note": "x"}),
        ({"a": zeros.astype(np.float64)}, {"note": "x"}), ({"a": zeros + 1}, {"note": "x"}),
        ({"a": -zeros}, {"note": "x"}), ({"a": zeros}, {"note": "y"}), ({"a": zeros}, {"notes": "x"}),
        ({"a": zeros}, {}), ({"a": zeros, "b": zeros}, {"note": "x"}),
    ]  # fmt: skip
    assert len({digest(*case) for case in cases}) == len(cases)
    assert digest({"a": zeros}, {"note": "x", "sha256": "0"}) == digest(*cases[0])


def test_a_file_is_held_to_shapes_before_it_is_read(tmp_path, monkeypatch):
    save_file({"weight": np.ones((2, 3)), "bias": np.ones(3)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    monkeypatch.setattr(TensorFile, "read", lambda self: pytest.fail("it was read"))
    good = {"weight": (2, 3), "bias": (3,)}
    file.check(good)
    for shapes, tensor, rule in [
        ({"weight": (2, 3)}, "bias", "belongs to nothing in this model"),
        (good | {"weights": (2, 3)}, "weights", r'is missing; the file has 2 tensors \(did you mean "weight"\?\)'),
        (good | {"weight": (3, 2)}, "weight", r"is F64\(2, 3\); expected \(3, 2\)"),
        (good | {"bias": (3, 1)}, "bias", r"is F64\(3,\); expected \(3, 1\)"),
    ]:
        with pytest.raises(FormatError, match=rule) as caught:
            file.check(shapes)
        assert caught.value.tensor == tensor


def test_the_largest_header_that_is_read_takes_little_memory_and_time(tmp_path):
    """Measured in a child, because the library's own memory is seen by the system alone."""
    entries = [(f"{i:x}", "F32", [0], b"") for i in range(16_000)]
    by_hand(tmp_path / "file", *entries)
    assert 0.8 * HEADER_BYTES < os.path.getsize(tmp_path / "file") < HEADER_BYTES

    def read():
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(FormatError, match="belongs to nothing"):
            TensorFile(tmp_path / "file").check({"weight": (2, 3)})
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert (after - before) * 1024 < 50e6 and time.process_time() - start < 1.0

    assert run_in_a_child(read) == 0
