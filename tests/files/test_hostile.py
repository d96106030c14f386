"""Every file that lies is one clear error, soon, and changes nothing: the corpus of hostile.py, loader by loader.

These tests exist because a file from elsewhere may be made to do harm, and one read wrong looks like a bad method.
"""

import copy
import json
import os
from dataclasses import asdict, fields

import hostile
import numpy as np
import pytest
from hostile import Seed
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import TINY, assert_well_said, base, in_front, parametrized, refused, spoil, state, tuned

from minilora import methods
from minilora.errors import AdapterFormatError, FormatError
from minilora.files.base import fingerprint, load_model, save_model
from minilora.files.checkpoint import (
    adapter_arrays,
    load_adapter,
    load_training,
    open_training,
    save_adapter,
    save_training,
)
from minilora.lab.finetune import Settings
from minilora.training.loop import History
from minilora.training.optim import AdamW

A, B = hostile.A, hostile.B

# -------------------------------------------------------------------------------- adapters

ADAPTER = hostile.format_seeds() | hostile.description_seeds() | hostile.array_seeds({A: 16, B: 16})
ADAPTER |= hostile.tampered_seeds()
VERA = hostile.vera_seeds()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The bytes of an adapter file by method; both have been loaded once, so that all imports are made."""
    folder, found = tmp_path_factory.mktemp("good"), {}
    for name in methods.names():
        model, *_ = tuned(name, ("q", "up"))
        model = tuned(name)[0] if name == "lora" else model
        save_adapter(folder / name, model, fingerprint(base()))
        load_adapter(folder / name, base())
        found[name] = (folder / name).read_bytes()
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A path in an empty folder that is the working one, so that a command that runs after all leaves its trace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "adapter.safetensors"


def assert_refused(path, good, seed):
    model = base()
    before, named = state(model), spoil(path, good, seed)
    with refused(path, named):
        load_adapter(path, model)
    assert state(model) == before


@parametrized(ADAPTER)
def test_a_file_that_lies_is_no_adapter(seed, adapters, here):
    assert_refused(here, adapters["lora"], seed)


@parametrized(VERA)
def test_a_file_that_lies_about_shared_arrays_is_no_adapter(seed, adapters, here):
    assert_refused(here, adapters["vera"], seed)


def of_each_tensor(good, path):
    """Seeds that take away, widen, shorten or spoil one tensor each."""
    path.write_bytes(good)
    for name, found in hostile.read(path)[0].items():
        if name != "__metadata__":
            shape = tuple(found["shape"])
            row = (shape[0] + 1, *shape[1:])
            yield Seed(hostile.rewritten(lambda arrays, notes, name=name: arrays.pop(name)), "is missing", name)
            for wrong in (row, (*shape, 1), shape[:-1] or (7,)):
                change = lambda arrays, notes, name=name, wrong=wrong: arrays.update({name: np.ones(wrong, np.float32)})
                yield Seed(hostile.rewritten(change), "expected", name)
            yield Seed(hostile.stored(name, np.nan, "F32", -1), "NaN or an infinity", name)


@pytest.mark.parametrize("name", methods.names())
def test_every_tensor_of_every_method_counts(name, adapters, here):
    for seed in of_each_tensor(adapters[name], here):
        assert_refused(here, adapters[name], seed)


@pytest.mark.parametrize("damage", [hostile.cuts, hostile.flips])
def test_every_cut_and_every_flip_is_seen(damage, adapters, here):
    """Without exception: in a file of minilora there is no byte that could be another without harm."""
    model = base()
    before, spoilt = state(model), damage(adapters["lora"])
    assert len(spoilt) > 400
    for name, data in spoilt.items():
        here.write_bytes(data)
        with pytest.raises(AdapterFormatError) as caught:
            load_adapter(here, model)
            pytest.fail(f"{name}: it was loaded")
        assert_well_said(caught.value, here)
    assert state(model) == before


def test_the_corpus_is_large(adapters, here):
    each = sum(len(list(of_each_tensor(good, here))) for good in adapters.values())
    swept = len(hostile.cuts(adapters["lora"])) + len(hostile.flips(adapters["lora"]))
    assert len(ADAPTER) + len(VERA) >= 300 and each >= 100 and swept >= 1000


ALLOWED = {
    "spaces behind the header": hostile.header_text(lambda header: header + b" " * 70),
    "a header without spaces": hostile.header_text(
        lambda header: json.dumps(json.loads(header), separators=(",", ":")).encode()
    ),
    "another order": lambda path: in_front(path, B),
    "a wider dtype": hostile.rewritten(lambda arrays, notes: arrays.update({A: arrays[A].astype(np.float64)})),
    "one more note": hostile.noted(note="trained on a Tuesday"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_another_writer_may_do_is_read_all_the_same(name, adapters, here):
    """So that it is the lie which is refused, and not the hand that wrote it."""
    here.write_bytes(adapters["lora"])
    adapter = arrays_after(here)
    ALLOWED[name](here)
    assert here.read_bytes() != adapters["lora"] and arrays_after(here) == adapter


def test_a_file_without_permission_is_no_adapter(adapters, here):
    """Root may read everything, so it asks as another."""
    here.write_bytes(adapters["lora"])
    here.chmod(0)
    model, user = base(), os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(AdapterFormatError, match="cannot be read: Permission denied"):
            load_adapter(here, model)
    finally:
        os.seteuid(user)


# -------------------------------------------------------------------------------- by chance

FUZZ = settings(max_examples=70, deadline=None, derandomize=True, database=None)


def arrays_after(path):
    """What the adapter is after loading; None where the file is refused."""
    try:
        model = load_adapter(path, base())
    except AdapterFormatError as error:
        assert_well_said(error, path)
        return None
    return {name: p.data.tobytes() for name, p in adapter_arrays(model).items()}


@pytest.fixture(scope="module")
def fuzzed(adapters, tmp_path_factory):
    """(path, the good file's bytes, what it loads to)."""
    path = tmp_path_factory.mktemp("fuzz") / "adapter.safetensors"
    path.write_bytes(adapters["lora"])
    return path, adapters["lora"], arrays_after(path)


@FUZZ
@given(data=st.binary(max_size=300), honest=st.booleans())
def test_bytes_by_chance_are_no_adapter(fuzzed, data, honest):
    path, *_ = fuzzed
    path.write_bytes(len(data).to_bytes(8, "little") + data if honest else data)
    assert arrays_after(path) is None


EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "copy"]), st.integers(0, 2**16), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits) -> bytes:
    for kind, at, piece in edits:
        at %= len(data) + 1
        if kind == "copy":
            piece = data[at // 2 : at // 2 + 8]
        kept = {"set": len(piece), "delete": len(piece), "insert": 0, "copy": 0}[kind]
        data = data[:at] + (b"" if kind == "delete" else piece) + data[at + kept :]
    return data


@FUZZ
@given(edits=EDITS)
def test_a_file_with_bytes_changed_by_chance_is_refused_or_the_same_adapter(fuzzed, edits):
    path, good, adapter = fuzzed
    path.write_bytes(edited(good, edits))
    assert arrays_after(path) in (None, adapter)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["r", "alpha", "options", "part", "blocks.0.q", "blocks.0.k", "name"]) | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)


@FUZZ
@given(
    where=st.sampled_from(["dtype", "shape", "data_offsets", "entry", "metadata", "layers", "options"]), value=VALUES
)
def test_a_header_with_a_value_by_chance_is_refused_or_the_same_adapter(fuzzed, where, value):
    path, good, adapter = fuzzed
    path.write_bytes(good)
    if where == "entry":
        hostile.instead(value)(path)
    elif where == "metadata":
        hostile.unsigned(value)(path)
    elif where == "layers":
        hostile.noted(layers=json.dumps(value))(path)
    elif where == "options":
        hostile.noted(layers=json.dumps({"blocks.0.q": {"options": value}}))(path)
    else:
        hostile.entry(**{where: value})(path)
    assert arrays_after(path) in (None, adapter)


# -------------------------------------------------------------------------------- checkpoints

TEXTS = {"method": "lora", "options": {"r": 2, "alpha": 16.0}, "targets": ["q"], "text_sha256": "0", "device": "cpu"}
SETTINGS = {field.name: 1 for field in fields(Settings)} | TEXTS | {"data": None, "replace": None, "base": None}
SETTINGS["recompute"] = False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a training checkpoint, with the adapter's A in front."""
    path = tmp_path_factory.mktemp("good") / "checkpoint.safetensors"
    model, optimizer, history, rng = tuned("lora")
    save_training(path, model, fingerprint(base()), optimizer, history, rng, SETTINGS)
    in_front(path, A)
    go_on(path, base(), History(), np.random.default_rng(0))
    return path.read_bytes()


def go_on(path, model, history, rng):
    file, found = open_training(path)
    Settings.read(file, found)
    return load_training(file, model, lambda params: AdamW(params, lr=0.1), history, rng)


def json_noted(key, change):
    """A spoil that changes one JSON text of the metadata, signed."""
    return hostile.rewritten(lambda arrays, notes: notes.update({key: json.dumps(change(json.loads(notes[key])))}))


def filled(name, value):
    return hostile.rewritten(lambda arrays, notes: arrays.update({name: np.full_like(arrays[name], value)}))


def setting(**changes):
    return json_noted("settings", lambda found: found | changes)


RANDOM = {
    "null": lambda found: None,
    "a list": lambda found: [],
    "empty": lambda found: {},
    "another generator": lambda found: found | {"bit_generator": "MT19937"},
    "a class": lambda found: found | {"bit_generator": "os.system"},
    "no numbers": lambda found: found | {"state": {}},
    "numbers null": lambda found: found | {"state": None},
    "text": lambda found: found | {"state": {"state": "1", "inc": "1"}},
    "negative": lambda found: found | {"state": {"state": -1, "inc": 1}},
    "2^128": lambda found: found | {"state": {"state": 2**128, "inc": 1}},
    "half a number of 2^64": lambda found: found | {"has_uint32": 2**64},
    "half a number that is text": lambda found: found | {"uinteger": "1"},
}
CHECKPOINT = {
    **{f"random: {name}": Seed(json_noted("random", change), "random") for name, change in RANDOM.items()},
    **{
        f"counts: {value}": Seed(hostile.noted(counts=value), "counts")
        for value in ("null", "[]", "[2, 4]", "[2, 4, 8, 16]", "[-1, 4, 8]", "[2.0, 4, 8]", "[true, 4, 8]", "{}", "x")
    },
    "counts: a billion steps": Seed(hostile.noted(counts="[1000000000, 4, 8]"), "expected", "history.loss"),
    "counts: no step": Seed(hostile.noted(counts="[0, 4, 8]"), "expected", "history.loss"),
    **{
        f"settings: {value[:20]}": Seed(hostile.noted(settings=value), "settings?|JSON")
        for value in ("null", "[]", '"lora"', "{}", "{", "[" * 100_000)
    },
    "settings: steps are text": Seed(setting(steps="4"), '"steps"'),
    "settings: options are a list": Seed(setting(options=[]), '"options"'),
    "settings: an option name": Seed(setting(options={"name": "dora"}), "no option"),
    "settings: r is -1": Seed(setting(options={"r": -1, "alpha": 1.0}), "at least 1"),
    "settings: a method that is a path": Seed(setting(method="../lora"), "unknown method"),
    "settings: one more": Seed(setting(run="touch killed"), "no run has"),
    "settings: one more of control codes": Seed(setting(**{"\x1b[2J\n" * 1000: 1}), "no run has"),
    "an adapter": Seed(hostile.noted(format="minilora adapter 2"), "no training checkpoint"),
    **{f"without {key}": Seed(hostile.noted(**{key: None}), "lacks") for key in ("settings", "random", "counts")},
    **{
        f"without {name}": Seed(hostile.rewritten(lambda arrays, notes, name=name: arrays.pop(name)), "missing", name)
        for name in ("optimizer.m", "optimizer.v", "optimizer.t", "history.loss", "history.seconds", A)
    },
    "one optimizer's state longer": Seed(
        hostile.rewritten(lambda arrays, notes: arrays.update({"optimizer.m": np.ones(33, np.float32)})),
        "expected", "optimizer.m",
    ),
    "steps that are no integer": Seed(filled("optimizer.t", 1.5), "steps", "optimizer.t"),
    "steps that are 1e300": Seed(filled("optimizer.t", 1e300), "steps", "optimizer.t"),
    "steps that are -1": Seed(filled("optimizer.t", -1.0), "steps", "optimizer.t"),
    "squares below zero": Seed(filled("optimizer.v", -1.0), "below 0", "optimizer.v"),
    "a momentum that is NaN": Seed(filled("optimizer.m", np.nan), "NaN", "optimizer.m"),
    "a momentum too large": Seed(
        hostile.rewritten(lambda arrays, notes: arrays.update({"optimizer.m": np.full(32, 1e300)})),
        "too large for float32", "optimizer.m",
    ),
}  # fmt: skip


@parametrized(hostile.format_seeds() | CHECKPOINT)
def test_a_file_that_lies_is_no_checkpoint(seed, checkpoint, here):
    model, history, rng = base(), History(), np.random.default_rng(5)
    before, named = (state(model), copy.deepcopy(history), rng.bit_generator.state), spoil(here, checkpoint, seed)
    with refused(here, named):
        go_on(here, model, history, rng)
    assert (state(model), history, rng.bit_generator.state) == before


@pytest.mark.parametrize("damage", [hostile.cuts, hostile.flips])
def test_a_damaged_checkpoint_is_seen(damage, checkpoint, here):
    """Every 13th of the cuts and flips: all of them are tried on an adapter."""
    model, history, rng = base(), History(), np.random.default_rng(5)
    before = state(model), copy.deepcopy(history), rng.bit_generator.state
    for name, data in list(damage(checkpoint).items())[::13]:
        here.write_bytes(data)
        with pytest.raises(AdapterFormatError) as caught:
            go_on(here, model, history, rng)
            pytest.fail(f"{name}: it was loaded")
        assert_well_said(caught.value, here)
    assert (state(model), history, rng.bit_generator.state) == before


# -------------------------------------------------------------------------------- base models


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """The bytes of a model's file, with an array of 64 bytes in front."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_model(path, base())
    in_front(path, "positions")
    load_model(path)
    return path.read_bytes()


@parametrized(hostile.format_seeds() | hostile.model_seeds(asdict(TINY)))
def test_a_file_that_lies_is_no_model(seed, model_file, here):
    named = spoil(here, model_file, seed)
    with refused(here, named, FormatError):
        load_model(here)


def test_every_tensor_of_a_model_counts(model_file, here):
    seeds = list(of_each_tensor(model_file, here))
    assert len(seeds) == 5 * len(dict(base().named_parameters()))
    for seed in seeds:
        named = spoil(here, model_file, seed)
        with refused(here, named, FormatError):
            load_model(here)


@pytest.mark.parametrize("damage", [hostile.cuts, hostile.flips])
def test_a_damaged_model_is_seen(damage, model_file, here):
    """Every 13th of the cuts and flips: all of them are tried on an adapter."""
    for name, data in list(damage(model_file).items())[::13]:
        here.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            load_model(here)
            pytest.fail(f"{name}: it was loaded")
        assert_well_said(caught.value, here)
