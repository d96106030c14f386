"""The table of hostile files: for every loader, the ways to spoil a good file that it must refuse.

A case spoils one file of a folder that a loader reads. Most cases know no loader: they break the safetensors format or
the JSON. The others change what a file says of itself and sign it again, so that no checksum can be what catches them.
"""

import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
from runs import make_inputs
from safetensors import safe_open

from minilora import methods
from minilora.cli import main
from minilora.files.base import fingerprint, load_model, save_model
from minilora.files.checkpoint import load_adapter, load_training, open_training, save_adapter, save_training
from minilora.files.errors import AdapterFormatError, FormatError
from minilora.files.gpt2 import load_gpt2, save_gpt2
from minilora.files.peft import load_peft, save_peft
from minilora.files.tensorfile import DIGEST, tensor_bytes
from minilora.gpt import GPT, GPTConfig
from minilora.lab import finetune
from minilora.surgery import adapt
from minilora.training.history import History
from minilora.training.optim import AdamW
from minilora.training.trainer import train

TINY = GPTConfig(vocab_size=11, n_positions=2, n_embd=8, n_layer=1, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 2))
GONE, FIRST = object(), "the name of the first tensor"
KILLER = b"cos\nsystem\n(S'touch killed'\ntR."  # a pickle that would run a command
LONG, DEEP = 10**3999, 100_000
CLEAR = "\x1b[2J\nall is well"  # control codes, which a terminal must not get
A, B, D = "blocks.0.q.arrays.A", "blocks.0.q.arrays.B", "blocks.0.q.arrays.d"
PEFT_A, WPE = "base_model.model.blocks.0.q.lora_A.weight", "transformer.wpe.weight"
WEIGHTS, CONFIG, PEFT_PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"  # of PEFT
GPT2_FILE, GPT2_INDEX, GPT2_PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# ---------------------------------------------------------------------------------------------- the parts of a file


def read(path):
    """(header as a dict, the bytes of the arrays)."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write(path, header, data: bytes):
    """Write a dict, or the bytes that shall be the header, and the bytes of the arrays."""
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def first(header) -> str:
    return next(name for name in header if name != "__metadata__")


def in_front(path, name):
    """Put the tensor ``name`` first in the header and in the data."""
    header, data = read(path)
    notes, tail = header.pop("__metadata__"), b""
    for key in sorted(header, key=lambda key: (key != name, header[key]["data_offsets"])):
        begin, end = header[key]["data_offsets"]
        header[key]["data_offsets"] = [len(tail), len(tail) + end - begin]
        tail += data[begin:end]
    write(path, {"__metadata__": notes, name: header[name]} | header, tail)


# ---------------------------------------------------------------------------------- spoils: functions of a file's path


def raw(change):
    """Change the file's bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def instead(data: bytes):
    return raw(lambda good: data)


def header_text(change):
    """Change the header's text; its length is told truly."""
    return lambda path: write(path, change(json.dumps(read(path)[0]).encode()), read(path)[1])


def edited(change):
    """Change the header in place by change(header, the first tensor's name, data); returned bytes become the data."""

    def spoil(path):
        header, data = read(path)
        new = change(header, first(header), data)
        write(path, header, new if isinstance(new, bytes) else data)

    return spoil


def entry(**changes):
    """Change the first tensor's dtype, shape or data_offsets."""
    return edited(lambda header, name, data: header[name].update(changes))


def notes(**changes):
    """Change the metadata, and leave the checksum as it was."""
    return edited(lambda header, name, data: header["__metadata__"].update(changes))


def entry_text(text: bytes):
    """Put raw JSON in the place of the first tensor's entry."""

    def change(header):
        found = json.loads(header)
        return header.replace(json.dumps(found[first(found)]).encode(), text)

    return header_text(change)


def repeated(spell):
    """Name the first tensor a second time, spelt by ``spell(name)``, with the same good entry."""

    def change(header):
        found = json.loads(header)
        again = f"{{{spell(first(found))}: {json.dumps(found[first(found)])}, "
        return again.encode() + header[1:]

    return header_text(change)


def renamed(new):
    return edited(lambda header, name, data: header.update({new: header.pop(name)}))


def length(change):
    """Lie about the header's length: change(length, size of the file)."""

    def spoil(path):
        good = path.read_bytes()
        told = change(int.from_bytes(good[:8], "little"), len(good))
        path.write_bytes((told % 2**64).to_bytes(8, "little") + good[8:])

    return spoil


def shifted(first_by, others_by, change):
    """Move the first tensor's offsets and those of the others, and the data by ``change(data)``."""

    def move(header, name, data):
        for key in header.keys() - {"__metadata__"}:
            by = first_by if key == name else others_by
            header[key]["data_offsets"] = [n + by for n in header[key]["data_offsets"]]
        return change(data)

    return edited(move)


def rewritten(change):
    """Change the arrays {name: array} and the metadata {key: text} in place, and sign the file again."""

    def spoil(path):
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        change(arrays, metadata)
        path.write_bytes(tensor_bytes(arrays, metadata))

    return spoil


def noted(**changes):
    """Change the metadata, signed; GONE takes a key away."""

    def change(arrays, metadata):
        metadata.update(changes)
        for key in [key for key in changes if changes[key] is GONE]:
            del metadata[key]

    return rewritten(change)


def json_noted(key, change):
    """Put ``change(data)`` in the place of the JSON data under one key of the metadata, signed."""
    return rewritten(lambda arrays, metadata: metadata.update({key: json.dumps(change(json.loads(metadata[key])))}))


def layers(change):
    """Change {path: {"options": …}} in place, signed."""

    def changed(found):
        change(found)
        return found

    return json_noted("layers", changed)


def options(**changes):
    return layers(lambda found: [layer["options"].update(changes) for layer in found.values()])


def array(name, change):
    """Put ``change(array)`` in the place of one array, signed; None takes it away."""

    def change_arrays(arrays, metadata):
        arrays[name] = change(arrays.pop(name))
        if arrays[name] is None:
            del arrays[name]

    return rewritten(change_arrays)


def bfloat16(name, bits):
    """Fill one tensor with these bits as BF16; the checksum, which is no longer right, would be looked at last."""
    half = array(name, lambda a: np.full(a.shape, bits, "<u2").view("<f2"))
    dtype = header_text(lambda header: header.replace(b'"F16"', b'"BF16"'))
    return lambda path: (half(path), dtype(path))


def changed(**values):
    """Change keys of a JSON file; GONE takes one away."""

    def spoil(path):
        found = json.loads(path.read_bytes()) | values
        path.write_text(json.dumps({key: value for key, value in found.items() if value is not GONE}))

    return spoil


def linked(target):
    """Put a symbolic link in the file's place."""
    return lambda path: (path.unlink(), path.symlink_to(target))


def only(name, data: bytes):
    """Put a file of another name in the place of the good one."""
    return lambda path: (path.unlink(), path.with_name(name).write_bytes(data))


# ------------------------------------------------------------------------------------ the format, whoever the loader is

FILES = {
    "missing": (Path.unlink, "there is no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "a folder, a pipe or a device"),
    "a pipe that nobody writes to": (lambda path: (path.unlink(), os.mkfifo(path)), "a folder, a pipe or a device"),
    "a link to zeros without end": (linked("/dev/zero"), "a folder, a pipe or a device"),
    "a link to nothing": (linked("nothing"), "there is no such file"),
    "a link to itself": (lambda path: linked(path.name)(path), "cannot be read"),
}
BROKEN = {  # what the library, or the JSON reader before it, refuses
    **{
        f"instead {data!r:.30}": instead(data)
        for data in (b"", b"{", bytes(8), b"\xff" * 1000, KILLER, b"PK\3\4" + bytes(26),
                     b"\x93NUMPY\1\0v\0{'descr': '<f4'}", b"<!DOCTYPE html>\n<html><title>404</title></html>\n",
                     b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    },
    "cut in the header": raw(lambda good: good[:50]),
    "cut in the arrays": raw(lambda good: good[:-1]),
    "a sparse file of a terabyte": lambda path: os.truncate(path, 1 << 40),
    "a byte more": raw(lambda good: good + b"\0"),
    "header length 0": length(lambda n, size: 0),
    "header length one more": length(lambda n, size: n + 1),
    "header length one too many": length(lambda n, size: size - 7),
    "header length 2^64 - 1": length(lambda n, size: -1),
    "header empty": header_text(lambda h: b""),
    "header in a list": header_text(lambda h: b"[" + h + b"]"),
    "header null": header_text(lambda h: b"null"),
    "header with a byte order mark": header_text(lambda h: b"\xef\xbb\xbf" + h),
    "header in Latin-1": header_text(lambda h: h.replace(b'"F32"', b'"F\xfc2"')),
    "a name twice": repeated(json.dumps),
    "a name twice, once escaped": repeated(lambda name: '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'),
    "metadata twice": header_text(lambda h: b'{"__metadata__": {}, ' + h[1:]),
    "a dtype twice": header_text(lambda h: h.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1)),
    "100,000 names": header_text(lambda h: b"{" + b",".join(b'"%x":{}' % i for i in range(100_000)) + b"}"),
    "a header of two million spaces": header_text(lambda h: h[:-1] + b" " * 2_000_000 + h[-1:]),
    **{
        f"entry {text[:20].decode()}": entry_text(text)
        for text in (b"null", b"[]", b"0", b"{}", b"None", b"NaN", b"-Infinity", b"1e999", b"9" * 100_000,
                     b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP)
    },
    **{
        f"without {key}": edited(lambda header, name, data, key=key: header[name].pop(key) and None)
        for key in ("dtype", "shape", "data_offsets")
    },
    **{
        f"shape {shape!r:.30}": entry(shape=shape)
        for shape in (None, "2, 8", 16, [-2, -8], [2**63], [2**64 + 16], [1e308], [2.0, 8.0], [True, 16], [[2, 8]],
                      [LONG], [0, 8], [1] * 100_000, [], [3, 8], [2**62] * 8, [2**60 + 1, 16], [2**62 + 16])
    },
    **{
        f"offsets {at!r:.30}": entry(data_offsets=at)
        for at in (None, "0, 64", [-64, 0], [0, 2**63], [2**64, 2**64 + 64], [0.0, 64.0], [False, 64], [64],
                   [0, 64, 64], [64, 0], [0, 63], [0, 65], [0, 0], [1, 65], [2**40, 2**40 + 64])
    },
    **{
        f"dtype {dtype!a:.30}": entry(dtype=dtype)
        for dtype in ("I64", "BOOL", "F4", "C64", "F16", "F64", "O", "", "F32\0", CLEAR, "\ud800", "F" * 100_000, None,
                      32, ["F32"])
    },
    "a hole before all": shifted(8, 8, lambda data: b"hide you" + data),
    "a hole between two": shifted(0, 8, lambda data: data[:64] + b"hide you" + data[64:]),
    "two on the same bytes": shifted(0, -64, lambda data: data[:-64]),
    **{
        f"metadata {value!r:.30}": edited(lambda header, name, data, value=value: header.update(__metadata__=value))
        for value in ([], "minilora adapter 2", 2, {"format": 1}, {"format": None}, {"format": "pt" * 1_000_000})
    },
}  # fmt: skip
REFUSED = r"is not .*(truncated|damaged|map of maps)|the header (is|has|holds)"
NAMES = [
    "../../etc/passwd", "", "q\0", CLEAR, "\x9b31m\x85", "\u202ea.syarra.q", "q" * 100_000, "__class__",
    "{0.__class__.__init__.__globals__} %s %n ${HOME} $(touch killed)", "BLOCKS.0.Q.ARRAYS.A",
]  # fmt: skip


def format_cases():
    """(name, spoil, rule, tensor) for any safetensors file whose first tensor is 64 bytes of F32 and lies in front."""
    for name, (spoil, rule) in FILES.items():
        yield name, spoil, rule, None
    for name, spoil in BROKEN.items():
        yield name, spoil, REFUSED, None
    for dtype in ("I32", "U32", {"F32": None}):  # of four bytes, or the right one oddly spelt: the library takes them
        yield f"dtype {dtype} again", entry(dtype=dtype), "its dtype is", FIRST
    yield "a hundred dimensions", entry(shape=[2, 8] + [1] * 98), "expected", FIRST
    for name in NAMES:
        yield f"name {name!a:.40}", renamed(name), "belongs to nothing|named after", name


# ------------------------------------------------------------------------------- what minilora's description says

WRONG_OPTIONS = [
    *({"r": r} for r in (10**12, 2**63, LONG, 9, 0, True, "8", None, 2.0, 1e308, [2])),
    *({"alpha": alpha} for alpha in (0, "16", True, None, LONG)),
    *({name: 1} for name in ("rank", "name", "__class__", "", CLEAR, "r" * 50_000)),
]
WRONG_LAYERS = [
    "{", "", "\ufeff{}", "[]", "{}", '"blocks.0.q"', '{"blocks.0.q": {"options": {"r": 2, "alpha": 1e999}}}',
    '{"blocks.0.q": {"options": {}}, "blocks.0.q": {"options": {}}}', "[" * DEEP, '{"blocks.0.q": ' + "9" * DEEP + "}",
    '{"blocks.0.q": null}', '{"blocks.0.q": {"options": {}, "method": "os.system"}}', '{"blocks.0.q": {}}',
    '{"blocks.0.q": {"options": [2, 16.0]}}',
    json.dumps({f"blocks.{i}.q": {"options": {}} for i in range(5000)}),
]  # fmt: skip
WRONG_PATHS = [
    "blocks.1.q", "blocks.-1.q", "blocks.00.q", "blocks.0", "blocks.0.q.W", "norm", "tokens", "", "blocks.0.__class__",
    "../../blocks.0.q", CLEAR, "blocks.0.q\0", "\ud800", "blocks.0.q" * 5_000,
]  # fmt: skip
WRONG_METHODS = [
    "os.system", "../lora", "minilora.methods.lora", "__init__", "LoRA", "lora ", "", "lora\0", CLEAR, "lora" * 20_000,
]  # fmt: skip
WRONG_PARTS = [  # of q in a VeRA file, which has 8 rows of B
    None, [0, 8], {"B": [8]}, {"B": [0, 8, 1]}, {"B": [0.0, 8.0]}, {"B": [False, 8]}, {"B": [-8, 0]}, {"B": [0, -1]},
    {"B": [2**31 - 8, 2**31]}, {"B": [8, 0]}, {"B": [0, 7]}, {"B": [0, 9]}, {"A": [0, 2]}, {CLEAR: [0, 8]},
]  # fmt: skip


def parted(part):
    return layers(lambda found: found["blocks.0.q"].update(part=part))


def moved(to):
    """Say that the adapter of one layer belongs to another."""
    return layers(lambda found: found.update({to: found.pop("blocks.0.q")}))


def adapter_cases():
    """For a file of minilora with LoRA (r 2, alpha 16) in blocks.0.q, whose d_in and d_out are 8."""
    for key in ("format", "base", "method", "layers"):
        yield f"without {key}", noted(**{key: GONE}), f'lacks "{key}"|format', None
    without = edited(lambda header, name, data: header["__metadata__"].pop(DIGEST) and None)
    yield "without a checksum", without, f'lacks "{DIGEST}"', None
    for form in ("", "pt", "minilora adapter 1", "MINILORA ADAPTER 2", "x" * 10_000):
        yield f"format {form:.20}", noted(format=form), "format", None
    for mark in ("", "0" * 64, CLEAR, "f" * 10_000):
        yield f"base {mark!a:.20}", noted(base=mark), "another base model", None
    for method in WRONG_METHODS:
        yield f"method {method!a:.30}", noted(method=method), "unknown method", None
    for wrong in WRONG_OPTIONS:
        yield f"options {wrong!a:.40}", options(**wrong), "r is|alpha|option|at most|large", None
    for text in WRONG_LAYERS:
        yield f"layers {text!a:.60}", noted(layers=text), "layer|at most|finite", None
    for path in WRONG_PATHS:
        yield f"layer {path!a:.30}", moved(path), "no linear layer", None
    yield "part of LoRA", parted({"B": [0, 8]}), "the part of the layer", None
    yield "method dora", noted(method="dora"), "is missing", "blocks.0.q.arrays.m"
    yield "method full", noted(method="full"), "no option", None
    yield "layer k", moved("blocks.0.k"), "belongs to nothing", A
    yield "layer k too", layers(lambda found: found.update({"blocks.0.k": found["blocks.0.q"]})), "is missing", None
    yield "r of 3", options(r=3), r"is F32\(2, 8\); expected \(3, 8\)", A

    for name, spoil in {
        "the first bit": edited(lambda header, name, data: bytes([data[0] ^ 1]) + data[1:]),
        "the last bit": edited(lambda header, name, data: data[:-1] + bytes([data[-1] ^ 1])),
        "two tensors exchanged": edited(lambda header, name, data: data[64:] + data[:64]),
        "another method of the same shapes": notes(method="rslora"),
        "a note more": notes(note="trust me"),
        "an empty checksum": notes(sha256=""),
    }.items():
        yield f"tampered with: {name}", spoil, "is damaged", None
    yield from number_cases(A)


def number_cases(name):
    """A number that is none at the end of the tensor ``name``, in each dtype, and one that is too large."""

    def ended(value, dtype):
        return array(name, lambda a: np.append(a.ravel()[:-1], value).astype(dtype).reshape(a.shape))

    for value, bits in ((np.nan, 0x7FC0), (np.inf, 0x7F80), (-np.inf, 0xFF80)):
        yield f"{value} in BF16", bfloat16(name, bits), "NaN or an infinity", name
        for dtype in (np.float64, np.float32, np.float16):
            yield f"{value} in {dtype.__name__}", ended(value, dtype), "NaN or an infinity", name
    yield "1e300", ended(1e300, np.float64), "too large for float32", name


def vera_cases():
    """For a file of minilora with VeRA (r 2) in blocks.0.q (d_out 8) and blocks.0.up (d_out 32)."""
    for part in WRONG_PARTS:
        yield f"part {part!a}", parted(part), "the part of the layer", None
    yield "part: rows that the file does not have", parted({"B": [40, 48]}), "expected", "shared.B"
    yield "part: of 2^31 rows", parted({"B": [2**31 - 9, 2**31 - 1]}), "expected", "shared.B"
    yield "r of a billion", options(r=10**9), "expected", D
    yield "r of 10^18", options(r=10**18), "below 2³²", None
    for r in (3, 10**9):
        spoil = layers(lambda found, r=r: found["blocks.0.up"]["options"].update(r=r))
        yield f"one layer's r {r}", spoil, "share", None
    for key, value in [("d_initial", 0), *(("projection_prng_key", k) for k in (-1, 2**32, 10**30, "0"))]:
        yield f"{key} {value}", options(**{key: value}), key + "|at least 0|above 0", None


# -------------------------------------------------------------------------------------- checkpoints and base models

WRONG_RANDOM = [
    {}, {"bit_generator": "MT19937"}, {"bit_generator": "os.system"}, {"state": {}}, {"state": None},
    {"state": {"state": "1", "inc": "1"}}, {"state": {"state": -1, "inc": 1}}, {"state": {"state": 2**128, "inc": 1}},
    {"has_uint32": 2**64}, {"uinteger": "1"},
]  # fmt: skip


def checkpoint_cases():
    for wrong in WRONG_RANDOM:
        spoil = json_noted("random", lambda found, wrong=wrong: found | wrong if wrong else wrong)
        yield f"random {wrong!r:.50}", spoil, "random", None
    for text in ("null", "[]", "[2, 4]", "[-1, 4, 8]", "[2.0, 4, 8]", "[true, 4, 8]", "{}", "x"):
        yield f"counts {text}", noted(counts=text), "counts", None
    for text in ("[1000000000, 4, 8]", "[0, 4, 8]"):
        yield f"counts {text}", noted(counts=text), "expected", "history.loss"
    for text in ("null", "[]", '"lora"', "{", "[" * 100_000):
        yield f"settings {text:.20}", noted(settings=text), "settings", None
    yield "an adapter", noted(format="minilora adapter 2"), "no training checkpoint", None
    for key in ("settings", "random", "counts"):
        yield f"without {key}", noted(**{key: GONE}), "lacks", None
    for name in ("optimizer.m", "optimizer.v", "optimizer.t", "history.loss", "history.seconds", A):
        yield f"without {name}", array(name, lambda a: None), "missing", name
    yield "a longer momentum", array("optimizer.m", lambda a: np.append(a, a[:1])), "expected", "optimizer.m"
    for name, value, rule in [
        ("optimizer.t", 1.5, "steps"), ("optimizer.t", 1e300, "steps"), ("optimizer.t", -1.0, "steps"),
        ("optimizer.v", -1.0, "below 0"), ("optimizer.m", np.nan, "NaN"),
    ]:  # fmt: skip
        yield f"{name} {value}", array(name, lambda a, value=value: np.full_like(a, value)), rule, name


def run_cases():
    """For the checkpoint of a run: its settings, which are read before anything else of the run."""

    def setting(**changes):
        return json_noted("settings", lambda found: {k: v for k, v in (found | changes).items() if v is not GONE})

    yield "no settings", noted(settings="{}"), "setting", None
    for key, value in [
        ("steps", GONE), ("steps", "4"), ("steps", -1), ("options", None), ("options", {"name": "dora"}),
        ("options", {"r": -1, "alpha": 1.0}), ("method", "../lora"), ("method", CLEAR), ("lr", 10**400),
        ("seed", CLEAR), ("every", 0), ("workers", None), ("lr", None), ("text_sha256", None),
        ("text_sha256", 7), (CLEAR, 1), ("run", "touch killed"),
    ]:  # fmt: skip
        rule = rf"\b{re.escape(key)}\b|setting|option|at least"
        yield f"settings {key!a:.20} {value!a:.20}", setting(**{key: value}), rule, None


def model_cases():
    """For the file of a model of the sizes TINY."""

    def config(**sizes):
        return json_noted("config", lambda found: {k: v for k, v in (found | sizes).items() if v is not GONE})

    deep, long = "[" * DEEP, json.dumps({"n_embd": LONG})
    for text in ("{", "[1]", '"n_embd"', "null", deep, long, '{"n_embd": 8, "n_embd": 8}'):
        yield f"config {text:.30}", noted(config=text), "config|n_embd|expected", None
    for key, value in [
        ("n_heads", 2), ("n_head", 0), ("n_embd", "8"), ("n_embd", 8.0), ("n_layer", -1), ("n_embd", CLEAR),
        ("dropout", "0"), ("dropout", 2), ("dropout", math.nan), ("n_head", 3), ("n_layer", 10**9),
    ]:  # fmt: skip
        yield f"config {key} {value!r}", config(**{key: value}), "config|is|multiple|layers", None
    yield "two layers", config(n_layer=2), "is missing", "blocks.1.norm1.g"
    for key, tensor in [("n_embd", "tokens"), ("n_positions", "positions"), ("vocab_size", "tokens")]:
        yield f"{key} of two billion", config(**{key: 2 * 10**9}), "expected", tensor
    yield "the default sizes", noted(config="{}"), "expected", "tokens"
    for form in (GONE, "", "pt", "minilora model 2", "minilora adapter 2", "x" * 10_000):
        yield f"format {form!r:.20}", noted(format=form), "no model", None
    yield from number_cases("positions")


# ------------------------------------------------------------------------------ the JSON files of PEFT and transformers

WRONG_TEXTS = [
    b"", b"{", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), bytes(1000), KILLER, b"NaN", b"[]", b"null",
    b"peft_type: LORA\nr: 2\n", b"{'r': __import__('os').system('touch killed')}",
    b"[" * DEEP, b'{"r": ' + b"9" * DEEP + b"}", b'{"r": 1, "r": 1}', b"{" + b" " * 2_000_000 + b"}",
]  # fmt: skip
NO_SIZE = [None, 0, True, "8", 2.0, math.nan, [2], 2**31, LONG]
NO_ALPHA = [None, 0, -1, True, "16", 1e308, LONG, math.inf]
NO_NAMES = [GONE, None, 1, [1], [["q"]], {"q": 1}]
PEFT_WRONG = {
    "peft_type": [GONE, None, [], "", "lora", "PROMPT_TUNING", "../LORA", CLEAR, "L" * 100_000],
    "r": [GONE, *NO_SIZE],
    "lora_alpha": [GONE, *NO_ALPHA],
    "target_modules": NO_NAMES,
    "exclude_modules": [1, True, [1]],
    "layers_to_transform": ["0", -1, True, [True], 2**70],
    "layers_pattern": [1, True, [1]],
    "rank_pattern": [[], "q", *({"q": value} for value in (None, 0, "8", LONG))],
    "alpha_pattern": [[], "q", *({"q": value} for value in (None, 0, "8", LONG))],
    "use_dora": [None, 1, "true", []],
    "use_rslora": [None, 1, "true", []],
    "init_lora_weights": [None, 1, [], "loftq", "os.system", CLEAR],
    "bias": [None, True, "", "all"],
    **{key: [["q"]] for key in ("modules_to_save", "layer_replication", "target_parameters")},
    **{key: [True] for key in ("lora_bias", "use_qalora", "use_bdlora", "run", "lora_alpah", CLEAR, "r" * 100_000)},
}
PEFT_VERA_WRONG = {
    "d_initial": [None, 0, -1, True, "0.1", 1e308],
    "projection_prng_key": [None, -1, True, 0.0, "0", 2**31, LONG],
    "save_projection": [None, 0, "true"],
}
# What takes a backtracking matcher longer than anyone waits, on some name; and what is no expression at all.
EXPRESSIONS = [
    "(a+)+$", "([a-z.]+)*$", "(.|.)*x", "(a|aa)+$", "((.*)(.*))*x", ".*" * 20 + "!", ".*?" * 20 + "!",
    r"[\w.]{0,20}" * 12 + "!", ".?" * 60 + "!", "(.?){60}!", r"(.+)\1+x" * 8, "(" * 200 + ")" * 200 + "*",
    "(q|k|v|o){60}x", "(?:" * 5000, "(?(1)a|b", "q{99999999999999999999}", "\\", "(?x: ( a + ) + ) $", "q" * 100_000,
    "a|" * 100_000, "\0" * 2000, "(.*)*" * 200,
]  # fmt: skip
MISMATCHED = [  # good configurations, but not that of the tensors
    {"r": 3}, {"r": 9}, {"r": 2**31 - 1}, {"rank_pattern": {"q": 3}}, {"target_modules": ["k"]}, {"target_modules": []},
    {"target_modules": ["q", "k"]}, {"target_modules": "all-linear"}, {"target_modules": ["../../q"]},
    {"use_dora": True}, {"exclude_modules": ["q"]}, {"layers_to_transform": [7]},
    {"target_modules": [f"q{i}" for i in range(2000)]}, {"rank_pattern": {f"q{i}": 2 for i in range(2000)}},
]  # fmt: skip
GPT2_WRONG = {
    "vocab_size": [None, 0, -1, "8", 2.0],
    "n_positions": [True, 2**31],
    "n_embd": [[8], math.nan],
    "n_layer": NO_SIZE,
    "n_head": [0, {}, LONG],
    "model_type": [None, "llama", ["gpt2"], "os.system", CLEAR],
    "activation_function": [None, "relu", "__import__('os')", 1],
    "layer_norm_epsilon": [None, 1e-6, 0, "1e-5", True],
    "scale_attn_weights": [None, False, 1],
    "scale_attn_by_inverse_layer_idx": [None, True, 0],
    "tie_word_embeddings": [None, False, 1],
    "add_cross_attention": [None, True],
    "n_inner": [0, 7, "32", True, 2**40],
}
OTHER_SIZES = [  # possible ones, but not those of the file: nothing may be allocated for them
    {"vocab_size": 12}, {"vocab_size": 2**30}, {"n_positions": 3}, {"n_positions": 2**31 - 1}, {"n_embd": 16},
    {"n_embd": 2**30}, {"n_layer": 2}, {"n_layer": 2**31 - 1}, {"n_head": 3}, {"n_head": 2**31 - 1},
]  # fmt: skip
INDEXES = [
    {"wte.weight": name}
    for name in ("../model.safetensors", "/tmp/model.safetensors", "a/model.safetensors", "..\\model.safetensors",
                 "pytorch_model.bin", "model\0.safetensors", "model.safetensors\n", CLEAR, None)
] + [{}, ["model.safetensors"], "model.safetensors"]  # fmt: skip


def json_cases(wrong, others):
    """For a JSON file: its text, ``wrong`` {key: values that it must not have}, and ``others``, which do not fit."""
    for text in WRONG_TEXTS:
        yield f"text {text!r:.30}", instead(text), "not JSON|not a map|holds NaN|nested|twice|larger", None
    for name, (spoil, rule) in FILES.items():
        yield name, spoil, rule, None
    yield "a sparse file of a terabyte", lambda path: os.truncate(path, 1 << 40), "is larger than", None
    for key, values in wrong.items():
        for value in values:
            text = "missing" if value is GONE else f"{value!a:.30}"
            rule = rf"\b{re.escape(key)}\b|unknown key|holds -?(NaN|Inf)"
            yield f"{key!a:.30} {text}", changed(**{key: value}), rule, None
    for changes in others:
        yield f"{changes!r:.60}", changed(**changes), ".", None


def peft_config_cases():
    yield from json_cases(PEFT_WRONG, MISMATCHED)
    keys = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
    for i, expression in enumerate(EXPRESSIONS):
        key = keys[i % len(keys)]
        values = {key: {expression: 2} if key in ("rank_pattern", "alpha_pattern") else expression}
        more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
        yield f"{key} {expression!a:.30}", changed(**values, **more), ".", None


def peft_vera_config_cases():
    for key, value in [(key, value) for key, values in PEFT_VERA_WRONG.items() for value in values]:
        yield f"{key} {value!r:.20}", changed(**{key: value}), key, None
    for r in (1, 3, 10**9, 2**31 - 1):
        for saved in (True, False):
            yield f"r of {r}, projections saved: {saved}", changed(r=r, save_projection=saved), ".", None


def peft_cases():
    yield "another configuration's tensors", notes(adapter_config_sha256="0" * 64), "another|replaced", None
    yield "a pickle", only(PEFT_PICKLE, KILLER), "is a pickle, which can run any code", None
    yield from number_cases(PEFT_A)


def peft_vera_cases():
    for name in ("base_model.vera_A", "base_model.vera_B"):
        yield f"without {name}", array(name, lambda a: None), "is missing", name
        yield f"less of {name}", array(name, lambda a: a[:1]), "expected", name
        yield f"{name} turned", array(name, lambda a: a.T.copy()), "expected", name


def gpt2_cases():
    yield "a pickle", only(GPT2_PICKLE, KILLER), "is a pickle, which can run any code", None
    for index in INDEXES:
        spoil = only(GPT2_INDEX, json.dumps({"weight_map": index}).encode())
        yield f"index {index!a}", spoil, "weight_map names", None
    yield from number_cases(WPE)


def gpt2_config_cases():
    yield from json_cases(GPT2_WRONG, OTHER_SIZES)


# ---------------------------------------------------------------------------------------------------- the loaders


class Victim:
    """All that a failed load could change."""

    def __init__(self):
        self.model, self.history, self.rng = base(), History(), np.random.default_rng(5)

    def state(self):
        arrays = {name: (p.requires_grad, p.data.tobytes()) for name, p in self.model.named_parameters()}
        return arrays, self.history.__dict__ | {"loss": list(self.history.loss)}, self.rng.bit_generator.state


def base() -> GPT:
    return GPT(TINY, 1)


def tuned(name, targets=("q",)):
    """(model, optimizer, history, rng) of a short run in which every array has moved."""
    model = adapt(base(), name, list(targets), verbose=False, **methods.known(name, r=2))
    optimizer, history = AdamW(model.trainable(), lr=0.1), History()
    train(model, optimizer, iter([(IDS, IDS[:, ::-1])] * 2), 2, history=history)
    return model, optimizer, history, np.random.default_rng(3)


def save(loader, folder):
    """Write a folder that the loader ``loader`` of LOADERS reads."""
    name = "vera" if "VeRA" in loader else "lora"
    model, optimizer, history, rng = tuned(name, ("q", "up") if name == "vera" else ("q",))
    if loader.startswith("PEFT"):
        save_peft(folder, model, names="minilora")
        without = edited(lambda header, name, data: header.update(__metadata__={"format": "pt"}))
        without(folder / WEIGHTS)  # the checksum of the configuration, which PEFT does not write
    elif loader.startswith("GPT-2"):
        save_gpt2(folder, base())
        in_front(folder / GPT2_FILE, WPE)
    elif loader == "run":
        inputs = folder.with_name("inputs")
        inputs.mkdir()
        tiny, text = make_inputs(inputs, width=8)
        command = ["train", "lora", "--base", tiny, "--data", text, "--out", folder, "--steps", 1, "--batch", 2]
        assert main([str(word) for word in command]) == 0
    else:
        folder.mkdir()
        if loader == "model":
            save_model(folder / "file", base())
            in_front(folder / "file", "positions")
        elif loader == "checkpoint":
            save_training(folder / "file", model, fingerprint(base()), optimizer, history, rng, {"steps": 2})
            in_front(folder / "file", A)
        else:
            save_adapter(folder / "file", model, fingerprint(base()))


def load(loader, folder, victim):
    """Load the folder as the loader ``loader`` of LOADERS does, into ``victim`` where it loads into something."""
    if loader.startswith("PEFT"):
        load_peft(folder, victim.model)
    elif loader.startswith("GPT-2"):
        load_gpt2(folder)
    elif loader == "run":
        finetune.resume(folder, progress=False)
    elif loader == "model":
        load_model(folder / "file")
    elif loader == "checkpoint":
        file, _ = open_training(folder / "file")
        load_training(file, victim.model, lambda parameters: AdamW(parameters, lr=0.1), victim.history, victim.rng)
    else:
        load_adapter(folder / "file", victim.model)


LOADERS = {  # name: (its cases, the file that they spoil, others that the error may name, the error)
    "adapter": (adapter_cases, "file", (), AdapterFormatError),
    "VeRA": (vera_cases, "file", (), AdapterFormatError),
    "checkpoint": (checkpoint_cases, "file", (), AdapterFormatError),
    "run": (run_cases, finetune.CHECKPOINT, (), AdapterFormatError),
    "model": (model_cases, "file", (), FormatError),
    "PEFT": (peft_cases, WEIGHTS, (PEFT_PICKLE,), AdapterFormatError),
    "PEFT, VeRA": (peft_vera_cases, WEIGHTS, (), AdapterFormatError),
    "PEFT's configuration": (peft_config_cases, CONFIG, (WEIGHTS,), AdapterFormatError),
    "PEFT's configuration, VeRA": (peft_vera_config_cases, CONFIG, (WEIGHTS,), AdapterFormatError),
    "GPT-2": (gpt2_cases, GPT2_FILE, (GPT2_INDEX, GPT2_PICKLE), FormatError),
    "GPT-2's configuration": (gpt2_config_cases, "config.json", (GPT2_FILE,), FormatError),
}
FORMAT_LOADERS = ("adapter", "checkpoint", "model", "PEFT", "GPT-2")  # of a safetensors file, each with its own errors


def table(every_loader=False) -> dict:
    """{name: (loader, spoil, rule, tensor)}: a case of the format is for one loader in turn, or for all of them."""
    found = {f"{loader}: {name}": (loader, *case) for loader, (cases, *_) in LOADERS.items() for name, *case in cases()}
    for i, (name, *case) in enumerate(format_cases()):
        for loader in FORMAT_LOADERS if every_loader else [FORMAT_LOADERS[i % len(FORMAT_LOADERS)]]:
            found[f"{loader}: format: {name}"] = (loader, *case)
    return found


# ------------------------------------------------------------------------------------------------ every byte


def cuts(good: bytes) -> list[bytes]:
    """Every length that the file could have been cut to up to the arrays, and every eighth byte of these."""
    end = 8 + int.from_bytes(good[:8], "little")
    return [good[:n] for n in [*range(end + 1), *range(end, len(good), 8), len(good) - 1]]


def flips(good: bytes) -> list[bytes]:
    """Each bit of each byte of the length and the header, turned, and all; one bit of each byte of the arrays."""
    end = 8 + int.from_bytes(good[:8], "little")
    masks = [(at, mask) for at in range(end) for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255)]
    masks += [(at, 1 << at % 8) for at in range(end, len(good))]
    return [good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at, mask in masks]
