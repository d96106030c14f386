"""The command line as a user meets it: every command runs, and every bad input gets one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import GPT, GPTConfig, methods
from minilora.cli import main
from minilora.files.base import save_model
from minilora.lab import compare, pretrain, task
from minilora.lab.compare import ROW_KEYS
from minilora.tools import gradcheck


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tiny model with the tokenizer's alphabet: the commands do not care how good it is."""
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    save_model(path, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    return str(path)


def run(*argv):
    return main([str(a) for a in argv])


def test_compare_writes_its_three_files_with_every_method_and_key(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task, "SAMPLE_TOKENS", 20)
    monkeypatch.setattr(task, "PASSAGES", 16)
    argv = ["compare", "--base", base, "--steps", 6, "--r", 2, "--batch", 4, "--seed", 3, "--workers", 1]
    out = tmp_path / "deep" / "out"
    with monkeypatch.context() as patch:  # the picture of all methods is drawn in tests/plots
        patch.setattr(compare.figures, "comparison", lambda *_: None)
        patch.setattr(compare, "png", lambda figure: b"")
        assert run(*argv, "--out", out) == 0
    page, printed = (out / "compare.md").read_text(), capsys.readouterr().out
    result = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in result["rows"]] == methods.names()
    for row in result["rows"]:
        assert list(row) == ROW_KEYS
        assert (row["steps"], row["seed"]) == (6, 3)
        assert row["loss_b_after"] < row["loss_b_before"]
        assert row["kept_bytes"] > 0 and row["tokens_per_second"] > 0
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["seconds_per_step"])
        assert f"| {row['method']}" in page and f"| {row['method']}" in printed
        assert f"{row['trainable']:,}" in page
    assert set(result["samples"]) == {"before", *methods.names()}
    assert set(result["curves"]) == set(methods.names())

    assert run(*argv, "--out", tmp_path / "again", "--methods", "lora") == 0  # the same seed, the same results
    png = (tmp_path / "again" / "compare.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20]) > 1000  # width in pixels
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    (first,) = [row for row in result["rows"] if row["method"] == "lora"]
    timed = {"seconds_per_step", "tokens_per_second"}
    assert all(first[key] == value for key, value in again["rows"][0].items() if key not in timed)
    assert result["samples"]["lora"] == again["samples"]["lora"]


def test_train_saves_an_adapter_that_generate_uses(base, tmp_path, capsys):
    text = tmp_path / "my.txt"
    text.write_text("the cat sat on the mat. " * 60)
    out = tmp_path / "run"
    assert run("train", "lora", "--base", base, "--data", text, "--steps", 30, "--lr", 0.1, "--r", 4, "--alpha", 8,
               "--batch", 2, "--target-modules", "q,v", "--out", out) == 0  # fmt: skip
    history = json.loads((out / "history.json").read_text())
    assert len(history["loss"]) == 30 and history["held_out_after"] < history["held_out_before"]
    printed = capsys.readouterr().out
    assert "2 layers matched (q, v)" in printed and "Held-out loss" in printed
    texts = []
    for extra in ([], ["--adapter", out]):
        assert run("generate", "--base", base, "--prompt", "the cat", "--tokens", 60, "--seed", 1, *extra) == 0
        texts.append(capsys.readouterr().out)
    assert all(t.startswith("the cat") for t in texts) and texts[0] != texts[1]


def test_pretrain_writes_a_model_file(tmp_path, capsys, monkeypatch):
    tiny = pretrain.Recipe(GPTConfig(n_positions=16, n_embd=16, n_layer=1, n_head=2), batch=2)
    monkeypatch.setattr(pretrain, "Recipe", lambda: tiny)
    assert run("pretrain", "--steps", 2, "--out", tmp_path / "new.safetensors") == 0
    assert run("generate", "--base", tmp_path / "new.safetensors", "--tokens", 5) == 0


def test_methods_and_check_in_text_and_json(capsys, monkeypatch):
    assert run("methods") == 0
    assert "lora: LoRA" in capsys.readouterr().out
    assert run("methods", "--json") == 0
    entries = {e["method"]: e for e in json.loads(capsys.readouterr().out)}
    assert entries["lora"]["trainable"] == 4 * 8 * (4 * 256 + 2 * 640)  # layers * r * (d_in + d_out)
    assert entries["lora"]["options"] == {"r": 8, "alpha": 16.0}
    reports = gradcheck.check_methods(["lora"])
    monkeypatch.setattr(gradcheck, "check_methods", lambda names: reports)
    monkeypatch.setattr(gradcheck, "check_operations", lambda: reports[:1])
    assert run("check", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["reports"]) == 1 + len(reports)  # the operations too
    assert run("check", "lora", "-v") == 0
    assert "blind spot" in capsys.readouterr().out


def test_check_fails_with_exit_code_1_and_says_where(monkeypatch, capsys):
    lora = methods.get("lora")
    right = lora.backward

    def wrong(self, dy, saved, W, p):
        dx, grads = right(self, dy, saved, W, p)
        return dx, {**grads, "A": grads["A"] * (self.r / self.alpha)}

    monkeypatch.setattr(lora, "backward", wrong)
    assert run("check", "lora") == 1
    printed = capsys.readouterr().out
    assert "FAIL A" in printed and "constant factor 0.1875" in printed  # r / alpha = 3 / 16
    assert run("check", "lora", "--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


BAD = {
    "unknown method": (["train", "dorra"], "unknown method"),
    "rank above the layer": (["train", "lora", "--r", 4096], "at most"),
    "alpha nan": (["compare", "--alpha", "nan"], "alpha is nan"),
    "lr 0": (["compare", "--lr", 0], "lr is 0"),
    "unmatched target": (["train", "lora", "--target-modules", "q,zz"], 'no linear layer is named "zz"'),
    "no such text": (["train", "lora", "--data", "no-such-file.txt"], "no-such-file.txt"),
    "no such base": (["compare", "--base", "no-such-model.safetensors"], "no-such-model.safetensors"),
    "no such file of PEFT": (["import", "nowhere"], "there is no such file"),
    "no such run to export": (["export", "nowhere", "new"], "there is no such file"),
    "no such adapter": (["generate", "--adapter", "no-such-run"], "no-such-run"),
    "tokens 0": (["generate", "--tokens", 0], "n is 0"),
    "temperature": (["generate", "--temperature", -1], "temperature is -1"),
    "top-k": (["generate", "--top-k", 1000], "top_k is 1000"),
    "unknown character": (["generate", "--prompt", "naïve"], "U+00EF"),
    "check of an unknown method": (["check", "lroa"], 'did you mean "lora"'),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_exit_code_2_and_writes_nothing(argv, message, base, tmp_path, capsys):
    takes_base = argv[0] in ("compare", "train", "generate") and "--base" not in argv
    argv = [*argv, *(["--base", base] if takes_base else [])]
    argv += ["--out", tmp_path / "out"] if argv[0] in ("compare", "train", "import") else []
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("minilora: error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and not Path("new").exists()


@pytest.mark.parametrize("command", [["train", "lora"], ["generate"]])
def test_device_cuda_without_cupy_is_one_clear_sentence(command, base, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    out = ["--out", tmp_path / "out"] if command[0] != "generate" else []
    assert run(*command, "--base", base, "--device", "cuda", *out) == 2
    assert "gpu12" in (error := capsys.readouterr().err) and '"cpu"' in error and error.count("\n") == 1


@pytest.mark.parametrize("command", [["compare"], ["pretrain", "--steps", "1"]])
def test_an_output_folder_that_cannot_be_written(command, base, tmp_path, capsys):
    (tmp_path / "file").write_text("a file, not a folder")
    target = tmp_path / "file" / "out"
    extra = [] if command[0] == "pretrain" else ["--base", base]
    assert run(*command, *extra, "--out", target) == 2
    assert "cannot write to the folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "a file, not a folder"


def test_a_loss_that_is_not_finite_is_exit_code_1_and_leaves_an_adapter_that_generates(base, tmp_path, capsys):
    argv = ["train", "lora", "--base", base, "--steps", 30, "--r", 2, "--batch", 2, "--lr", 1e30, "--workers", 1]
    with np.errstate(all="ignore"):
        assert run(*argv, "--out", tmp_path) == 1
        assert run("generate", "--base", base, "--adapter", tmp_path, "--tokens", 5) == 0
    error = capsys.readouterr().err
    assert "the loss is nan" in error and "last good step" in error and "adapter.safetensors" in error


def test_nothing_is_imported_before_it_is_used():
    """The package imports NumPy alone, and the command line the command that is run."""
    show = "print(*sys.modules)"
    code = f"import sys, minilora; {show}; from minilora.cli import main; main(['devices']); {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = (set(line.split()) for line in done.stdout.splitlines())
    third_party = {"matplotlib", "tqdm", "safetensors", "cupy", "torch", "hypothesis", "scipy", "threadpoolctl"}
    assert "numpy" in first and not third_party & {name.partition(".")[0] for name in first}
    assert "minilora.tools.devices" in last
    assert not {"minilora.lab.finetune", "minilora.lab.sweep", "minilora.tools.exercises", "matplotlib"} & last


def test_a_closed_pipe_is_no_traceback():
    pipe = f"{sys.executable} -m minilora methods --json | head -c 5"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
