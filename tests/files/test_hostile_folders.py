"""The folders of PEFT and of transformers that lie: tensors by the corpus of hostile.py, JSON by that of its sibling.

These tests exist because such folders come from strangers: few are read before they are used.
"""

import json
import shutil

import hostile
import hostile_configs as configs
import numpy as np
import pytest
from hostile import Seed
from refusal import TINY, assert_well_said, base, in_front, parametrized, refused, spoil, state, tuned

from minilora.errors import AdapterFormatError, FormatError
from minilora.files import gpt2, peft, peft_config
from minilora.files.checkpoint import adapter_arrays
from minilora.files.gpt2 import load_gpt2, save_gpt2
from minilora.files.peft import load_peft, save_peft

A, B = (f"base_model.model.blocks.0.q.lora_{name}.weight" for name in "AB")


def unmarked(path):
    """As PEFT itself writes: without the checksum of the configuration that minilora adds."""
    header, data = hostile.read(path)
    hostile.write(path, header | {"__metadata__": {"format": "pt"}}, data)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folders that load: "lora" and "vera" of PEFT, "marked" with minilora's checksum, "gpt2" of transformers."""
    root = tmp_path_factory.mktemp("good")
    save_peft(root / "marked", tuned("lora")[0], names="minilora")
    shutil.copytree(root / "marked", root / "lora")
    save_peft(root / "vera", tuned("vera", ("q", "up"))[0], names="minilora")
    for name in ("lora", "vera"):
        unmarked(root / name / peft.TENSORS)
    for name in ("marked", "lora", "vera"):
        load_peft(root / name, base())
    save_gpt2(root / "gpt2", base())
    in_front(root / "gpt2" / gpt2.WEIGHTS, "transformer.wpe.weight")
    load_gpt2(root / "gpt2")
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A place for a folder; the working folder is above it, so that a command that runs after all leaves its trace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "folder"


def assert_refused(folder, good, file, seed, at=None):
    """``at``: the file that the error names, where it is not the spoilt one."""
    shutil.copytree(good, folder)
    model = base()
    before, named = state(model), spoil(folder / file, (good / file).read_bytes(), seed)
    with refused(folder / file, named, file=None if at is None else folder / at):
        load_peft(folder, model)
    assert state(model) == before


# -------------------------------------------------------------------------------- PEFT

TENSORS = hostile.format_seeds() | hostile.array_seeds({A: 16, B: 16})
CONFIG = configs.text_seeds("r") | configs.peft_seeds(peft_config.OFF)


@parametrized(TENSORS)
def test_tensors_that_lie_are_no_peft_adapter(seed, good, here):
    assert_refused(here, good / "lora", peft.TENSORS, seed)


@parametrized(CONFIG)
def test_a_configuration_that_lies_is_no_peft_adapter(seed, good, here):
    """The error names the configuration, or the tensors that are not those of the configuration."""
    shutil.copytree(good / "lora", here)
    model = base()
    before, named = state(model), spoil(here / peft.CONFIG, (here / peft.CONFIG).read_bytes(), seed)
    with refused(here / peft.CONFIG, named, file=(here / peft.CONFIG, here / peft.TENSORS)):
        load_peft(here, model)
    assert state(model) == before


# What is a good configuration by itself, and not that of the tensors.
MISMATCHED = {
    "r of 3": (configs.changed(r=3), A),
    "r of 1": (configs.changed(r=1), A),
    "r of q 3": (configs.changed(rank_pattern={"q": 3}), A),
    "another layer": (configs.changed(target_modules=["k"]), None),
    "one more layer": (configs.changed(target_modules=["q", "k"]), "base_model.model.blocks.0.k.lora_A.weight"),
    "all layers": (configs.changed(target_modules="all-linear"), "base_model.model.blocks.0.k.lora_A.weight"),
    "no layer": (configs.changed(target_modules=[]), None),
    "a layer that is not there": (configs.changed(target_modules=["../../q"]), None),
    "DoRA": (configs.changed(use_dora=True), "base_model.model.blocks.0.q.lora_magnitude_vector"),
    "q left out": (configs.changed(exclude_modules=["q"]), None),
    "another block": (configs.changed(layers_to_transform=[7]), None),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_a_configuration_of_other_tensors_is_one_error(name, good, here):
    change, tensor = MISMATCHED[name]
    shutil.copytree(good / "lora", here)
    change(here / peft.CONFIG)
    model = base()
    before = state(model)
    with refused(here / peft.TENSORS, Seed(change, ".", tensor or hostile.SOME)):
        load_peft(here, model)
    assert state(model) == before


@pytest.mark.parametrize("r", [9, 2**31 - 1])
def test_a_rank_that_no_layer_has_is_one_error(r, good, here):
    assert_refused(here, good / "lora", peft.CONFIG, Seed(configs.changed(r=r), "at most 8"))


VERA = {
    "d_initial": [None, 0, -1, True, "0.1", 1e308],
    "projection_prng_key": [None, -1, True, 0.0, "0", 2**31, 2**32, 10**30, int(hostile.LONG)],
    "save_projection": [None, 0, "true", []],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VERA.items() for value in values])
def test_a_configuration_that_lies_about_projections_is_one_error(key, value, good, here):
    assert_refused(here, good / "vera", peft.CONFIG, Seed(configs.changed(**{key: value}), key))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("r", [1, 3, 10**9, 2**31 - 1])
def test_projections_are_not_drawn_for_a_rank_that_lies(r, saved, good, here):
    seed = Seed(configs.changed(r=r, save_projection=saved), "expected|its key|belongs to nothing")
    assert_refused(here, good / "vera", peft.CONFIG, seed, at=peft.TENSORS)


@pytest.mark.parametrize("name", ["base_model.vera_A", "base_model.vera_B"])
def test_a_projection_that_is_not_there_or_has_another_shape_is_one_error(name, good, here):
    for change, rule in [
        (lambda arrays, notes: arrays.pop(name), "is missing"),
        (lambda arrays, notes: arrays.update({name: arrays[name][:1]}), "expected"),
        (lambda arrays, notes: arrays.update({name: arrays[name].T.copy()}), "expected"),
        (lambda arrays, notes: arrays.update({name: arrays[name] * np.float32(np.nan)}), "NaN"),
    ]:
        assert_refused(here, good / "vera", peft.TENSORS, Seed(hostile.rewritten(change), rule, name))
        shutil.rmtree(here)


def test_one_of_two_files_that_was_replaced_is_seen(good, here):
    """The checksum in the tensors' file is of the configuration's bytes: even a space more is another adapter's."""
    for change in (configs.changed(lora_alpha=32), hostile.raw(lambda text: text + b" ")):
        assert_refused(here, good / "marked", peft.CONFIG, Seed(change, "was written with another"), at=peft.TENSORS)
        shutil.rmtree(here)


def loaded(folder, model=None):
    """The adapter's method and arrays; None where the folder is refused."""
    try:
        model = load_peft(folder, model or base())
    except AdapterFormatError as error:
        assert_well_said(error, error.file)
        return None
    method = model.blocks[0].q.method
    return method, {name: p.data.tobytes() for name, p in adapter_arrays(model).items()}


def test_a_flip_in_the_tensors_header_is_seen_or_harmless(good, here):
    """PEFT writes no checksum: what a flip leaves readable may only be metadata, which says nothing that is used."""
    shutil.copytree(good / "lora", here)
    path, adapter = here / peft.TENSORS, loaded(here)
    bytes_of_arrays = len(hostile.read(path)[1])
    good_file, same, model = path.read_bytes(), 0, base()
    for data in list(hostile.flips(good_file).values())[:-bytes_of_arrays]:
        path.write_bytes(data)
        if (found := loaded(here, model)) is not None:
            assert found == adapter
            same, model = same + 1, base()
    assert 0 < same < 9 * len('"format": "pt"')


def test_every_cut_of_a_peft_file_is_seen(good, here):
    shutil.copytree(good / "lora", here)
    model = base()
    for file in (peft.TENSORS, peft.CONFIG):
        whole = (here / file).read_bytes()
        for n in range(len(whole)):
            (here / file).write_bytes(whole[:n])
            assert loaded(here, model) is None, n
        (here / file).write_bytes(whole)
    assert loaded(here) is not None


@pytest.mark.parametrize("data", [b"", b"\x80\x04", hostile.KILLER])
def test_a_pickle_is_never_read(data, good, here):
    shutil.copytree(good / "lora", here)
    (here / peft.TENSORS).rename(here / peft.PICKLE)
    (here / peft.PICKLE).write_bytes(data)
    with refused(here / peft.PICKLE, Seed(None, "is a pickle, which can run any code")):
        load_peft(here, base())


def test_what_is_only_data_is_only_data(good, here):
    """Keys that name classes, code or places are read over: the adapter is the same, and nothing of it happens."""
    shutil.copytree(good / "lora", here)
    adapter = loaded(here)
    for key in ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "runtime_config", "megatron_core"):
        for value in (
            "os.system('touch killed')",
            "../../etc/passwd",
            {"base_model_class": "os", "parent_library": "os"},
        ):
            configs.changed(**{key: value})(here / peft.CONFIG)
            assert loaded(here) == adapter
    assert [path.name for path in here.parent.iterdir()] == [here.name]


# -------------------------------------------------------------------------------- GPT-2 of transformers


def assert_no_model(folder, good, file, seed, at=None):
    shutil.copytree(good / "gpt2", folder)
    named = spoil(folder / file, (folder / file).read_bytes(), seed)
    with refused(folder / file, named, error=FormatError, file=None if at is None else folder / at):
        load_gpt2(folder)


WPE = "transformer.wpe.weight"


@parametrized(hostile.format_seeds() | hostile.array_seeds({WPE: 16, "transformer.ln_f.bias": 8}))
def test_tensors_that_lie_are_no_gpt2(seed, good, here):
    assert_no_model(here, good, gpt2.WEIGHTS, seed)


@parametrized(configs.text_seeds("n_layer") | configs.gpt2_seeds())
def test_a_configuration_that_lies_is_no_gpt2(seed, good, here):
    assert_no_model(here, good, gpt2.CONFIG, seed)


@pytest.mark.parametrize(("key", "size"), [(k, size) for k, sizes in configs.OTHER_SIZES.items() for size in sizes])
def test_nothing_is_allocated_for_sizes_that_the_file_does_not_have(key, size, good, here):
    assert_no_model(here, good, gpt2.CONFIG, Seed(configs.changed(**{key: size}), "."), at=gpt2.WEIGHTS)


@pytest.mark.parametrize("heads", [3, 2**31 - 1])
def test_heads_that_do_not_divide_the_width_are_one_error(heads, good, here):
    assert_no_model(here, good, gpt2.CONFIG, Seed(configs.changed(n_head=heads), "n_head"))


@pytest.mark.parametrize("name", configs.INDEXES)
def test_an_index_names_files_of_its_folder_alone(name, good, here):
    shutil.copytree(good / "gpt2", here)
    (here / gpt2.WEIGHTS).rename(here.parent / gpt2.WEIGHTS)
    (here / gpt2.INDEX).write_text(json.dumps(configs.INDEXES[name]))
    with refused(here / gpt2.INDEX, Seed(None, "weight_map names"), error=FormatError):
        load_gpt2(here)


def test_an_index_of_a_file_that_is_not_there_is_one_error(good, here):
    shutil.copytree(good / "gpt2", here)
    (here / gpt2.WEIGHTS).unlink()
    (here / gpt2.INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "a.safetensors"}}))
    with refused(here / "a.safetensors", Seed(None, "there is no such file"), error=FormatError):
        load_gpt2(here)


def test_a_pickled_gpt2_is_never_read(good, here):
    shutil.copytree(good / "gpt2", here)
    (here / gpt2.WEIGHTS).rename(here / gpt2.PICKLE)
    (here / gpt2.PICKLE).write_bytes(hostile.KILLER)
    with refused(here / gpt2.PICKLE, Seed(None, "is a pickle, which can run any code"), error=FormatError):
        load_gpt2(here)


def test_every_tensor_of_gpt2_counts(good, here):
    shutil.copytree(good / "gpt2", here)
    path, whole = here / gpt2.WEIGHTS, (good / "gpt2" / gpt2.WEIGHTS).read_bytes()
    names = [name for name in hostile.read(path)[0] if name != "__metadata__"]
    assert len(names) == 4 + 12 * TINY.n_layer
    for name in names:
        for change, rule in [
            (lambda arrays, notes, name=name: arrays.pop(name), "is missing"),
            (lambda arrays, notes, name=name: arrays.update({name: np.repeat(arrays[name], 2, 0)}), "expected"),
            (lambda arrays, notes, name=name: arrays.update({name: np.full_like(arrays[name], np.inf)}), "infinity"),
        ]:
            named = spoil(path, whole, Seed(hostile.rewritten(change), rule, name))
            with refused(path, named, error=FormatError):
                load_gpt2(here)
