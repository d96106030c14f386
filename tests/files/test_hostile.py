"""Every file that lies is one clear error, soon, and changes nothing: the table of hostile.py, and damage by chance.

These tests exist because a file from elsewhere may be made to do harm, and one read wrong looks like a bad method.
``--nightly``: every case of the format on every loader, every cut and flip, and more by chance.
"""

import json
import os
import re
import shutil
import sys
import time
import tracemalloc

import hostile
import numpy as np
import pytest
from hostile import FIRST, LOADERS, A, B, Victim, base
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import methods
from minilora.files.base import fingerprint
from minilora.files.checkpoint import adapter_arrays, load_adapter, save_adapter
from minilora.files.errors import AdapterFormatError
from minilora.files.peft import load_peft
from minilora.lab import finetune

for name in methods.names():  # imported before any test, which sees what a file makes imported
    methods.get(name)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = hostile.table(every_loader=metafunc.config.getoption("--nightly"))
        names = [re.sub(r"[^\w .,:()\[\]'-]", "?", name) for name in cases]
        metafunc.parametrize("case", cases.values(), ids=names)


@pytest.fixture(scope="module", autouse=True)
def no_samples():
    """The text that a run writes before and after takes longer than its training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "write_sample", lambda *_: "")
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The good folder of each loader; each has been loaded once, so that all imports are made."""
    found = {}

    def folder(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("good") / "folder"
            hostile.save(name, found[name])
            hostile.load(name, found[name], Victim())
        return found[name]

    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def here(workplace, monkeypatch):
    """A place for a folder; the working folder is above it, so that a command that runs after all leaves its trace."""
    monkeypatch.chdir(workplace)
    yield workplace / "folder"
    shutil.rmtree(workplace / "folder")


def assert_well_said(error, files):
    """It names one of the files and the rule, and no terminal obeys it."""
    text = str(error)
    assert error.file in map(str, files) and error.file in text and error.rule
    assert text.isprintable() and len(text) < 600


VICTIM = Victim()  # of all tests, as each leaves it as it was


def assert_refused(loader, folder, rule, tensor=None, victim=VICTIM):
    """One error that says all that it must, in time and memory, with nothing imported, changed or left behind."""
    _, file, others, kind = LOADERS[loader]
    modules, listing = set(sys.modules), sorted(os.listdir(folder))
    before = victim.state()
    tracemalloc.start()
    start = time.process_time()  # of this process alone, on however busy a machine
    try:
        with pytest.raises(kind) as caught:
            hostile.load(loader, folder, victim)
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = caught.value
    assert_well_said(error, [folder / name for name in (file, *others)])
    assert re.search(rule, error.rule), error.rule
    assert tensor is None or (error.tensor == tensor and "tensor " in str(error))
    assert seconds < 1.0 and peak < 50e6
    assert victim.state() == before
    assert set(sys.modules) == modules and sorted(os.listdir(folder)) == listing
    assert os.listdir(folder.parent) == [folder.name]


def test_a_file_that_lies_is_one_error(case, good, here):
    loader, spoil, rule, tensor = case
    shutil.copytree(good(loader), here)
    path = here / LOADERS[loader][1]
    tensor = hostile.first(hostile.read(path)[0]) if tensor is FIRST else tensor
    spoil(path)
    assert_refused(loader, here, rule, tensor)


def test_the_table_is_large_and_for_all_loaders():
    cases = hostile.table()
    assert len(cases) > 300 and {loader for loader, *_ in cases.values()} == set(LOADERS)


EACH_TENSOR = {
    "missing": (lambda a: None, "is missing"),
    "a row more": (lambda a: np.ones((len(a) + 1, *a.shape[1:]), a.dtype), "expected"),
    "NaN": (lambda a: a * np.nan, "NaN or an infinity"),
}


def assert_each_tensor_counts(loader, folder):
    path = folder / LOADERS[loader][1]
    whole, names = path.read_bytes(), hostile.read(path)[0].keys() - {"__metadata__"}
    for name in sorted(names):
        for change, rule in EACH_TENSOR.values():
            path.write_bytes(whole)
            hostile.array(name, change)(path)
            assert_refused(loader, folder, rule, name)


@pytest.mark.parametrize("name", methods.names())
def test_every_tensor_of_every_method_counts(name, here):
    here.mkdir()
    save_adapter(here / "file", hostile.tuned(name)[0], fingerprint(base()))
    assert_each_tensor_counts("adapter", here)


@pytest.mark.parametrize("loader", ["model", "GPT-2"])
def test_every_tensor_of_a_base_model_counts(loader, good, here):
    shutil.copytree(good(loader), here)
    assert_each_tensor_counts(loader, here)


# ------------------------------------------------------------------------------------------------ what is allowed


def arrays_of(folder, load=lambda folder, model: load_adapter(folder / "file", model)):
    """The bytes of each array of the adapter in ``folder``."""
    return {name: p.data.tobytes() for name, p in adapter_arrays(load(folder, base())).items()}


ALLOWED = {
    "spaces behind the header": hostile.header_text(lambda header: header + b" " * 70),
    "a header without spaces": hostile.header_text(
        lambda header: json.dumps(json.loads(header), separators=(",", ":")).encode()
    ),
    "another order": lambda path: hostile.in_front(path, B),
    "a wider dtype": hostile.array(A, lambda a: a.astype(np.float64)),
    "one more note": hostile.noted(note="trained on a Tuesday"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_another_writer_may_do_is_read_all_the_same(name, good, here):
    """So that the lie is refused, and not the writer."""
    shutil.copytree(good("adapter"), here)
    whole, adapter = (here / "file").read_bytes(), arrays_of(here)
    ALLOWED[name](here / "file")
    assert (here / "file").read_bytes() != whole and arrays_of(here) == adapter


def test_what_is_only_data_is_only_data(good, here):
    """Keys that name classes, code or places are not followed: the adapter is the same, and nothing of it happens."""
    shutil.copytree(good("PEFT"), here)
    adapter = arrays_of(here, load_peft)
    for key in ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "runtime_config"):
        for value in ("os.system('touch killed')", "../../etc/passwd", {"parent_library": "os"}):
            hostile.changed(**{key: value})(here / hostile.CONFIG)
            assert arrays_of(here, load_peft) == adapter
    assert os.listdir(here.parent) == [here.name]


# ----------------------------------------------------------------------------------------- cuts, flips, and chance


def some(damaged: list, request) -> list:
    """Forty of them, spread over the file, or all with ``--nightly``."""
    return damaged if request.config.getoption("--nightly") else damaged[:: len(damaged) // 40]


@pytest.mark.parametrize("damage", [hostile.cuts, hostile.flips])
@pytest.mark.parametrize("loader", ["adapter", "checkpoint", "model"])
def test_a_damaged_file_is_seen(loader, damage, good, here, request):
    """No byte in a file of minilora could be another without harm."""
    shutil.copytree(good(loader), here)
    path, victim = here / "file", Victim()
    before, damaged = victim.state(), damage(path.read_bytes())
    for data in some(damaged, request):
        path.write_bytes(data)
        with pytest.raises(LOADERS[loader][3]) as caught:
            hostile.load(loader, here, victim)
        assert_well_said(caught.value, [path])
    assert victim.state() == before and len(damaged) > 400


@pytest.mark.parametrize("damage", [hostile.cuts, hostile.flips])
def test_damage_to_a_peft_file_is_seen_or_harmless(damage, good, here, request):
    """PEFT writes no checksum: the tensors' numbers may change, but every cut and lie of the header is seen."""
    shutil.copytree(good("PEFT"), here)
    path, adapter, harmless = here / hostile.WEIGHTS, arrays_of(here, load_peft), 0
    header, numbers = hostile.read(path)
    damaged = [data for data in damage(path.read_bytes()) if not data.startswith(path.read_bytes()[: -len(numbers)])]
    for data in some(damaged, request):
        path.write_bytes(data)
        try:
            assert arrays_of(here, load_peft) == adapter
            harmless += 1
        except AdapterFormatError as error:
            assert_well_said(error, [path])
    assert harmless < 9 * len(json.dumps(header["__metadata__"]))  # only metadata says nothing that is used


def try_many(request, here, spoil, **values):
    """Spoil the adapter by ``spoil(path, **values)``, values by chance: it is refused, or loads as before."""
    path, adapter = here / "file", arrays_of(here)
    whole = path.read_bytes()

    def check(**drawn):
        path.write_bytes(whole)
        spoil(path, **drawn)
        try:
            assert arrays_of(here) == adapter
        except AdapterFormatError as error:
            assert_well_said(error, [path])

    examples = 1000 if request.config.getoption("--nightly") else 15
    settings(max_examples=examples, deadline=None, derandomize=True, database=None)(given(**values)(check))()


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4)


def test_a_file_with_bytes_changed_by_chance_is_refused_or_the_same_adapter(good, here, request):
    def edit(path, edits):
        data = path.read_bytes()
        for at, removed, inserted in edits:
            at %= len(data) + 1
            data = data[:at] + inserted + data[at + removed :]
        path.write_bytes(data)

    shutil.copytree(good("adapter"), here)
    try_many(request, here, edit, edits=EDITS)


TEXT = st.text('aB0."\\\0\n\x1b\u202e\ud800é😀', max_size=8)  # to choose from all of Unicode takes seconds
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
WORDS = st.sampled_from(["r", "alpha", "options", "part", "blocks.0.q", "blocks.0.k"]) | TEXT
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)
PLACES = {
    **{key: lambda value, key=key: hostile.entry(**{key: value}) for key in ("dtype", "shape", "data_offsets")},
    "an entry": lambda value: hostile.edited(lambda header, name, data: header.update({name: value})),
    "metadata": lambda value: hostile.edited(lambda header, name, data: header.update(__metadata__=value)),
    "layers": lambda value: hostile.noted(layers=json.dumps(value)),
    "options": lambda value: hostile.layers(lambda found: found["blocks.0.q"].update(options=value)),
}


def test_a_value_by_chance_is_refused_or_the_same_adapter(good, here, request):
    def put(path, where, value):
        PLACES[where](value)(path)

    shutil.copytree(good("adapter"), here)
    try_many(request, here, put, where=st.sampled_from(sorted(PLACES)), value=VALUES)
