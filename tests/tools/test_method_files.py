"""Method files that are not in the package: found, checked, trained, saved and exported like the others.

tests/dropped_in has two, whose arrays have sizes and dtypes of their own, and whose fields have all types.
"""

import dataclasses
import json

import numpy as np
import pytest
import source
import test_contract
from test_contract import tiny_batches, tiny_model

from minilora import GPT, AdamW, GPTConfig, InputError, adapt, methods
from minilora.backend import to_host
from minilora.cli import main
from minilora.files.base import fingerprint, load_model, save_model
from minilora.files.checkpoint import load_adapter, load_training, open_training, save_adapter, save_training
from minilora.files.errors import AdapterFormatError
from minilora.files.peft import load_peft
from minilora.files.tensorfile import write_tensors
from minilora.lab import finetune
from minilora.surgery import adapted_layers
from minilora.tools.contract import CHECKS, Case
from minilora.tools.exercises import grade
from minilora.tools.gradcheck import check_model, method_point
from minilora.tools.methodfile import length
from minilora.training.history import History
from minilora.training.trainer import train

# ------------------------------------------------------------------------------------------- options of any type


@pytest.fixture
def dropped_in(monkeypatch):
    """As if the files of tests/dropped_in were in the folder of methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(source.DROPPED_IN)])


def test_options_are_real_types_and_python_values(dropped_in):
    assert methods.options("marked") == {
        **methods.options("lora"), "start": (float, 0.5), "shift": (float, 0.0), "flipped": (bool, False),
        "wording": (str, "none"), "cuts": (list[int], []), "cap": (int | None, None), "table": (dict, {}),
    }  # fmt: skip
    given = {"r": np.int64(2), "alpha": np.float32(4), "shift": 0, "flipped": np.bool_(True), "cuts": "1,2"}
    method = methods.create("marked", **given)
    found = dataclasses.asdict(method)
    python = {"r": 2, "alpha": 4.0, "start": 0.5, "shift": 0.0, "flipped": True, "wording": "none", "cuts": (1, 2),
              "cap": None, "table": {}}  # fmt: skip
    assert [(value, type(value)) for value in found.values()] == [(value, type(value)) for value in python.values()]
    assert methods.create("marked", **json.loads(json.dumps(found))) == method  # as it stands in a file
    assert methods.create("marked", cuts=[np.int64(3)], cap=7).cuts == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is 0; the rank must be an integer of at least 1"),
        ({"r": True}, "r is True; the rank"),
        ({"r": 2.0}, r"r is 2\.0; the rank"),
        ({"r": 2**32}, "r is 4294967296; it must be an integer of at least 0 and below 2³²"),
        ({"alpha": 0.0}, r"alpha is 0\.0; it must be a finite number above 0$"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number"),
        ({"alpha": 10**400}, "alpha is 1000.*; it must be a finite number"),
        ({"alpha": True}, "alpha is True; it must be a finite number"),
        ({"shift": -1.0}, r"shift is -1\.0; it must be a finite number above 0, or 0$"),
        ({"flipped": 1}, "flipped is 1; it must be True or False"),
        ({"wording": 3}, "wording is 3; it must be text"),
        ({"cuts": "1,b"}, "cuts is '1,b'; it must be a list such as 1,2"),
        ({"cuts": 3}, "cuts is 3; it must be a list"),
        ({"cap": "1"}, "cap is '1'; it must be an integer"),
        ({"flip": True}, r'marked has no option "flip" \(did you mean "flipped"\?\)'),
    ],
)
def test_an_option_that_cannot_be_used_is_one_error(dropped_in, options, message):
    with pytest.raises(InputError, match=message):
        methods.create("marked", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 8}, "has its options already, and r would be ignored"), ({"lora_alpha": 16}, 'did you mean "alpha"')],
)
def test_options_beside_a_method_that_has_its_own_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        adapt(tiny_model(), methods.create("lora", r=2), verbose=False, **options)


# ------------------------------------------------------------------------------------------- a new method is a file


@pytest.mark.parametrize("name", ["square", "marked"])
def test_a_file_in_the_folder_is_a_method_everywhere(dropped_in, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")  # takes longer than the training
    for check in (
        test_contract.test_each_tagged_backward_line_matters_and_the_check_sees_it,
        test_contract.test_shape_comments_are_true_while_the_code_runs,
        test_contract.test_kept_bytes_are_what_the_allocator_says,
        test_contract.test_the_file_is_plain_and_holds_no_array,
        test_contract.test_training_moves_the_adapter_and_leaves_the_base_bit_identical_twice,
        test_contract.test_merge_and_exact_unmerge,
    ):
        check(name)
    assert main(["check", name]) == main(["check", "--file", str(source.path_of(name))]) == 0
    base, out, form = (str(tmp_path / part) for part in ("tiny.safetensors", "out", "form"))
    save_model(base, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    flags = ["--flipped", "--cuts", "1", "--no-flipped", "--shift", "0"] if name == "marked" else []
    (tmp_path / "mine.txt").write_text("When shall we three meet again?\n" * 12)  # little to evaluate on
    common = ["--base", base, "--data", str(tmp_path / "mine.txt"), "--steps", "2", "--workers", "1"]
    assert main(["train", name, *common, "--r", "3", "--lr", "0.1", "--out", out, *flags]) == 0
    assert main(["train", "--resume", out]) == 0
    assert main(["export", out, form, "--form", "merged", "--base", base]) == 0
    lora = ["export", out, f"{form}_lora", "--form", "lora", "--base", base]
    assert main(lora) == (0 if name == "marked" else 2)  # only a method with factors is a LoRA
    assert main(["diff", "lora", name]) == main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert {"square": "trains M (m, m)", "marked": "trains A (r, d_in), B (d_out, r)"}[name] in printed
    if name == "marked":
        loaded = load_peft(f"{form}_lora", load_model(base))
        assert adapted_layers(loaded)["blocks.0.o"].p.A.shape == (3, 16)


@pytest.mark.parametrize("name", ["square", "marked"])
def test_arrays_of_any_size_and_integers_come_back_as_they_were(dropped_in, name, tmp_path):
    def make_optimizer(parameters):
        return AdamW(parameters, 1e-2)

    model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=3, cuts=(1, 2)))
    optimizer = make_optimizer(model.trainable())
    history = train(model, optimizer, tiny_batches(), 2)
    mark = fingerprint(tiny_model())
    save_adapter(tmp_path / "adapter", model, mark)
    save_training(tmp_path / "training", model, mark, optimizer, history, np.random.default_rng(0), {})
    loaded, resumed = load_adapter(tmp_path / "adapter", tiny_model()), tiny_model()
    load_training(open_training(tmp_path / "training")[0], resumed, make_optimizer, History(), np.random.default_rng(1))
    for path, layer in adapted_layers(model).items():
        for other in (loaded, resumed):
            found = adapted_layers(other)[path]
            assert found.method == layer.method
            assert {k: a.dtype for k, a in found.p.items()} == {k: a.dtype for k, a in layer.p.items()}
            assert all(np.array_equal(found.p[k], a) for k, a in layer.p.items())
        assert all(layer.p[k].dtype.kind == "i" for k in layer.method.integers)
    if name == "square":
        small = adapt(tiny_model(dtype=np.float64), name, ["blocks.1.down"], verbose=False, r=1)
        assert check_model(small, *next(tiny_batches()))  # its copies in float64 and complex128 leave integers alone
        assert layer.p.rows.dtype == np.int32 and layer.p.columns.dtype == np.int64
        arrays = {n: to_host(p.data) for n, p in model.named_parameters() if ".arrays." in n}
        metadata = open_training(tmp_path / "training")[0].metadata | {"format": "minilora adapter 2"}
        for key, kind in (("columns", float), ("M", int)):
            wrong = {n: a.astype(kind) if n.endswith(f"blocks.0.q.arrays.{key}") else a for n, a in arrays.items()}
            write_tensors(tmp_path / "wrong", wrong, metadata)
            with pytest.raises(AdapterFormatError, match=rf"arrays\.{key}.*its dtype is"):
                load_adapter(tmp_path / "wrong", tiny_model())


def changed(name, *pairs):
    text = source.text_of(name) if name == "lora" else (source.DROPPED_IN / f"{name}.py").read_text(encoding="utf-8")
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


MISTAKES = {  # what is changed in a method file, and what is said about it
    "another size": ("square", 'return {"M": (m, m)}', 'return {"M": (m, self.r)}',
                     "init makes  M (trainable) is (6, 3) by shapes, and init makes (6, 6)"),
    "a forgotten array": ("square", '"slots": (m,), ', "", "slots (a buffer) is None by shapes, and init makes (6,)"),
    "forgotten integers": ("square", '"slots", "inputs")', '"slots")', "integers is ('columns', 'rows', 'slots'), "
                           "the integers that init makes are in ['columns', 'inputs', 'rows', 'slots']: inputs"),
    "docstring": ("square", "M (m, m), columns", "M (m, r), columns", "docstring has M (m, r), and shapes (6, 6)"),
    "kept": ("square", "backward: h (N, m)", "backward: h (N, 2 m)", "states h (N, 2 m); forward keeps h (5, 6)"),
    "letter": ("square", "backward: h (N, m)", "backward: h (N, k)", 'the axis "k" has the letter k; there are'),
    "no reason": ("marked", 'starts_elsewhere = "B', 'why = "B', "it does not, and starts_elsewhere is ''"),
    "a reason for nothing": ("lora", "    claims", '    starts_elsewhere = "x"\n    claims',
                             "it does, and starts_elsewhere is 'x'"),
    "factors": ("lora", "        return sB, p.A", "        return p.B, p.A", "merge(W, p) is not W + B @ A"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_says_what_a_file_gets_wrong(mistake, tmp_path):
    name, old, new, hint = MISTAKES[mistake]
    (tmp_path / "mine.py").write_text(changed(name, (old, new)), encoding="utf-8")
    assert hint in str(grade(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("saved", "read", "stated"),
    [
        ("{\"x\": x.T, \"h\": h}", "dh.T @ saved.x.T", "x (d_in, N), h (N, r)"),
        ("{\"x\": x[::-1], \"h\": h}", "dh.T @ saved.x[::-1]", "x (N, d_in), h (N, r)"),
        ("{\"x\": x, \"h\": h, \"y\": y}", "dh.T @ saved.x", "x (N, d_in), h (N, r), y (N, d_out)"),
    ],
)  # fmt: skip
def test_backward_receives_just_what_forward_returned(saved, read, stated, tmp_path):
    """Views of x, and y itself, which the host must not write into; N = d_in gives x and its transpose one shape."""
    text = changed("lora", ("{\"x\": x, \"h\": h}", saved), ("dh.T @ saved.x", read),
                   ("backward: x (N, d_in), h (N, r)", f"backward: {stated}"))  # fmt: skip
    (tmp_path / "lora.py").write_text(text, encoding="utf-8")
    grades = grade(tmp_path / "lora.py")
    assert grades, grades
    method = source.load(text, "lora")(r=3)
    case = Case(method, text, *method_point(method, 7, 7, 6, at_init=False, seed=0))
    assert CHECKS["a layer with a bias does the same"](case) == ""


@pytest.mark.parametrize(
    ("axis", "expected"), [("N", 5), ("2 k", 8), ("r r", 9), ("r²", 9), ("2 r^3", 54), ("k·r", 12), ("7", 7)]
)
def test_the_length_of_an_axis(axis, expected):
    assert length(axis, {"N": 5, "k": 4, "r": 3}) == expected
