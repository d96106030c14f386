"""Saves are all or nothing, and readers believe nothing: files.py alone, call by call. hostile.py has the bad files.

These tests exist because what a save does in the wrong order is seen only after a power cut.
"""

import errno
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.errors import FormatError, InputError, shown
from minilora.files import tensorfile as files
from minilora.files.saving import sweep_litter, writable_folder, write_atomically
from minilora.files.tensorfile import TensorFile, parse_json, read_bytes

CALLS = ("open", "write", "fsync", "close", "replace")


class Watched:
    """The module os as files.py sees it, with its CALLS by (name, path) in ``seen``; ``before(number)`` may raise."""

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


def watch(monkeypatch, *args, **options):
    watched = Watched(*args, **options)
    monkeypatch.setattr(files, "os", watched)
    return watched


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------- saves


def test_bytes_are_on_the_disk_before_they_have_the_name_and_then_the_name_is(tmp_path, monkeypatch):
    path, temporary = tmp_path / "weights", tmp_path / f".weights.{os.getpid()}.minilora"
    watched = watch(monkeypatch)
    write_atomically(path, b"new")
    assert watched.seen == [
        ("open", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("replace", temporary),
        ("close", temporary),  # and with it goes the lock
        ("open", tmp_path),
        ("fsync", tmp_path),
        ("close", tmp_path),
    ]
    assert path.read_bytes() == b"new" and names(tmp_path) == ["weights"]


def test_another_start_sweeps_nothing_away_until_the_last_file_has_its_name(tmp_path, monkeypatch):
    replaced, replace = [], os.replace

    def with_another_start(source, target):
        writable_folder(tmp_path)
        replace(source, target)
        replaced.append(Path(target).name)

    monkeypatch.setattr(files.os, "replace", with_another_start)
    files.write_together({tmp_path / "one": b"1", tmp_path / "two": b"2"})
    assert replaced == ["one", "two"] == names(tmp_path)


def test_new_folders_are_on_the_disk_too(tmp_path, monkeypatch):
    watched = watch(monkeypatch)
    writable_folder(tmp_path / "a" / "b")
    assert [path for name, path in watched.seen if name == "fsync"] == [tmp_path / "a", tmp_path]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_write_that_takes_a_part_is_followed_by_another(most, tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(2000)
    watched = watch(monkeypatch, most=most)
    write_atomically(tmp_path / "weights", data)
    assert (tmp_path / "weights").read_bytes() == data
    assert [name for name, _ in watched.seen].count("write") == -(-2000 // most)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("number", range(8))
def test_a_call_that_fails_is_one_error_and_a_whole_file(number, code, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def before(count):
        if count == number:
            raise OSError(code, os.strerror(code))

    watched = watch(monkeypatch, before)
    with pytest.raises(InputError) as caught:
        write_atomically(path, b"new" * 100)
    assert str(caught.value) == f'cannot write "{path}": {os.strerror(code)}; no file there is half written'
    assert path.read_bytes() == (b"old" if number <= 3 else b"new" * 100)  # 3: the rename
    assert names(tmp_path) == ["weights"] and len(watched.seen) >= number + 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_exception_in_a_save_leaves_the_old_file_alone(stop, tmp_path, monkeypatch):
    def before(count):
        if count == 2:
            raise stop

    (tmp_path / "weights").write_bytes(b"old")
    watch(monkeypatch, before)
    with pytest.raises(stop):
        write_atomically(tmp_path / "weights", b"new")
    assert (tmp_path / "weights").read_bytes() == b"old" and names(tmp_path) == ["weights"]


@pytest.mark.parametrize("number", range(14))
def test_files_that_belong_together_are_all_on_the_disk_before_one_is_renamed(number, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(b"old")

    def before(count):
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watch(monkeypatch, before)
    if number < 13:
        with pytest.raises(InputError, match="No space left"):
            files.write_together({one: b"new", two: b"new"})
    else:
        files.write_together({one: b"new", two: b"new"})
    renamed = max(0, min(number - 6, 2))  # three calls stage each file; then come the renames
    assert [path.read_bytes() for path in (one, two)] == [b"new"] * renamed + [b"old"] * (2 - renamed)
    assert names(tmp_path) == ["one", "two"]


def test_a_path_that_cannot_be_is_one_error(tmp_path):
    for path in (tmp_path / ("n" * 300), tmp_path / "no folder" / "file", tmp_path):
        with pytest.raises(InputError, match="cannot write"):
            write_atomically(path, b"new")
    assert names(tmp_path) == []


def test_a_link_that_waits_under_the_temporary_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".weights.{os.getpid()}.minilora").symlink_to(victim)
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "weights", b"new")
    assert victim.read_bytes() == b"precious"


# -------------------------------------------------------------------------------- litter

CHILD = """
import os, signal, sys
from pathlib import Path
from minilora import files
write, path = os.write, Path(sys.argv[1])
def half(file, data):
    write(file, data[:5])
    {act}
files.os.write = half
files.write_atomically(path, b"new weights")
"""


def child(act, path):
    """A process that is half way through a save of ``path``, and then does ``act``."""
    code = CHILD.format(act=act)
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    with child("os.kill(os.getpid(), signal.SIGKILL)", path) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = f".weights.{process.pid}.minilora"
    assert names(tmp_path) == [left, "weights"] and (tmp_path / left).read_bytes() == b"new w"
    writable_folder(tmp_path)
    assert names(tmp_path) == ["weights"] and path.read_bytes() == b"old"


def test_what_a_living_process_writes_stays(tmp_path):
    path = tmp_path / "weights"
    act = "print(flush=True); sys.stdin.readline(); files.os.write = write; return 5"
    with child(act, path) as process:
        process.stdout.readline()
        left = f".weights.{process.pid}.minilora"
        writable_folder(tmp_path)
        assert names(tmp_path) == [left]
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == ["weights"] and path.read_bytes() == b"new weights"


@pytest.mark.parametrize(
    "name",
    ["weights", "notes.minilora", ".hidden", ".notes.12.tmp", ".a.12.minilora.txt", "a.12.minilora", ".a.b2.minilora"],
)
def test_the_files_of_others_stay(name, tmp_path):
    (tmp_path / name).write_text("mine")
    sweep_litter(tmp_path)
    assert names(tmp_path) == [name]


def test_what_only_has_the_name_of_litter_stays_and_does_not_hold_a_run_up(tmp_path):
    """In a process of its own: a pipe that is opened to be read waits for a writer, for ever."""
    (tmp_path / "precious").write_text("mine")
    os.mkfifo(tmp_path / ".pipe.1.minilora")
    (tmp_path / ".folder.2.minilora").mkdir()
    (tmp_path / ".link.3.minilora").symlink_to(tmp_path / "precious")
    code = "import sys; from minilora.files.saving import sweep_litter; sweep_litter(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=20, check=True)
    left = names(tmp_path)
    assert {".folder.2.minilora", ".link.3.minilora", "precious"} <= set(left)
    assert (tmp_path / "precious").read_text() == "mine"


# -------------------------------------------------------------------------------- JSON and bytes

GOOD_JSON = {
    b"{}": {},
    b' {"a": [1, 2.5, true, false, null, "\\u00e9"]} ': {"a": [1, 2.5, True, False, None, "é"]},
    '"é"'.encode(): "é",
    b'{"a": {"a": 1}}': {"a": {"a": 1}},
    b"-0": 0,
    b"1e308": 1e308,
    str(10**4000).encode(): 10**4000,
}
BAD_JSON = {
    b"": "the options is not JSON",
    b"{": "is not JSON",
    b"{'a': 1}": "is not JSON",
    b'{"a": 1,}': "is not JSON",
    b"{} {}": "is not JSON",
    b"\xef\xbb\xbf{}": "is not JSON",
    b"\xff\xfe{\0}\0": r"is not UTF-8 \(byte 0\)",
    b'{"a": "\xff"}': r"is not UTF-8 \(byte 7\)",
    b'"\n"': "is not JSON",
    b"NaN": "holds NaN, which is not JSON",
    b'{"a": [Infinity]}': "holds Infinity",
    b"-Infinity": "holds -Infinity",
    b'{"a": 1, "b": 2, "a": 1}': 'has the key "a" twice',
    b'[{"a\\u001b": 1, "a\\u001b": 2}]': r'has the key "a\\u001b" twice',
    b"9" * 10_000: "a number that is too long",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize(("text", "value"), GOOD_JSON.items())
def test_json_is_plain_data(text, value):
    for form in (text, text.decode()):
        found = parse_json(form, "file", "options")
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("text", "rule"), BAD_JSON.items(), ids=range(len(BAD_JSON)))
def test_json_that_is_not_strict_is_one_error(text, rule):
    class OwnError(FormatError):
        pass

    with pytest.raises(OwnError, match=rule) as caught:
        parse_json(text, "file", "options", OwnError)
    assert caught.value.file == "file" and caught.value.tensor is None and type(caught.value) is OwnError


def test_bytes_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5, "a file") == read_bytes(str(path), 100, "a file") == b"12345"
    with pytest.raises(FormatError, match="is larger than 4 bytes, the most that a file may have"):
        read_bytes(path, 4, "a file")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "there is no such file; a file was expected"),
        (Path.mkdir, "is not a file but a folder, a pipe or a device"),
        (os.mkfifo, "is not a file but a folder, a pipe or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file but a folder, a pipe or a device"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_bytes_of_another_kind_of_file_are_one_error(make, rule, tmp_path):
    make(tmp_path / "file")
    with pytest.raises(FormatError, match=rule):
        read_bytes(tmp_path / "file", 100, "a file")


@pytest.mark.parametrize("path", ["a\0b", "n" * 5000, "\ud800"])
def test_a_path_that_no_file_can_have_is_one_error(path):
    for read in (TensorFile, lambda path: read_bytes(path, 1, "a file")):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "quoted", "plain"),
    [
        ("plain", '"plain"', "plain"),
        ('say "é"', '"say \\"é\\""', 'say "é"'),
        ("\x1b[2J\n\x7f\x9b", '"\\u001b[2J\\n\\u007f\\u009b"', "\\u001b[2J\\n\\u007f\\u009b"),
        ("\ud800\u202e", '"\\ud800\\u202e"', "\\ud800\\u202e"),
        ("a" * 10**6, f'"{"a" * 79}…"', "a" * 359 + "…"),
        ("\0" * 10**6, '"' + ("\\u0000" * 14)[:79] + '…"', ("\\u0000" * 60)[:359] + "…"),
    ],
    ids=["plain", "quotes", "control codes", "surrogates", "long", "long and unprintable"],
)
def test_an_error_shows_what_a_file_says_in_letters_and_briefly(text, quoted, plain):
    error = FormatError("file", text, tensor=text)
    assert shown(text) == quoted and error.rule == plain
    assert str(error) == f'"file": tensor {quoted}: {plain}'


# -------------------------------------------------------------------------------- safetensors

VALUES = np.array([[1.5, -2.0, 0.0], [0.1, 65504.0, -1e-7]])


@pytest.mark.parametrize(("name", "dtype"), [("F64", np.float64), ("F32", np.float32), ("F16", np.float16)])
def test_arrays_come_in_their_dtype(name, dtype, tmp_path):
    arrays = {"a": VALUES.astype(dtype), "scalar": np.array(3.0, dtype), "deep": np.ones((1,) * 8, dtype)}
    save_file(arrays, tmp_path / "file", {"format": "pt"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata == {"format": "pt"}
    assert {key: entry[:2] for key, entry in file.tensors.items()} == {k: (name, a.shape) for k, a in arrays.items()}
    file.check({key: array.shape for key, array in arrays.items()})
    found = file.read()
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].dtype == dtype and found[key].shape == array.shape
        np.testing.assert_array_equal(found[key], array)


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


def test_what_is_written_is_read_to_the_bit_and_carries_a_checksum(tmp_path):
    arrays = {"a": VALUES, "b": VALUES.T.astype(np.float32)}  # b is not contiguous
    files.write_tensors(tmp_path / "file", arrays, {"note": "é\n"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata["note"] == "é\n" and re.fullmatch("[0-9a-f]{64}", file.metadata["sha256"])
    for name, array in file.read().items():
        assert array.dtype == arrays[name].dtype and np.array_equal(array, arrays[name])


def test_the_checksum_covers_names_shapes_dtypes_numbers_and_notes():
    base = {"a": np.zeros((2, 3), np.float32)}, {"note": "x"}
    others = [
        ({"b": np.zeros((2, 3), np.float32)}, {"note": "x"}),
        ({"a": np.zeros((3, 2), np.float32)}, {"note": "x"}),
        ({"a": np.zeros((2, 3), np.float64)}, {"note": "x"}),
        ({"a": np.ones((2, 3), np.float32)}, {"note": "x"}),
        ({"a": -np.zeros((2, 3), np.float32)}, {"note": "x"}),
        ({"a": np.zeros((2, 3), np.float32)}, {"note": "y"}),
        ({"a": np.zeros((2, 3), np.float32)}, {"notes": "x"}),
        ({"a": np.zeros((2, 3), np.float32)}, {}),
        ({"a": np.zeros((2, 3), np.float32), "b": np.zeros(1)}, {"note": "x"}),
    ]
    assert len({files.digest(*case) for case in [base, *others]}) == len(others) + 1
    assert files.digest(base[0], base[1] | {"sha256": "0"}) == files.digest(*base)


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
        ({}, "bias", "belongs to nothing"),
    ]:
        with pytest.raises(FormatError, match=rule) as caught:
            file.check(shapes)
        assert caught.value.tensor == tensor or shapes == {}
