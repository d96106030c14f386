"""The settings of a run are defined once, and the command line takes each word for what the user meant by it."""

import dataclasses
import json
import re

import numpy as np
import pytest

from minilora import cli, methods
from minilora.errors import InputError
from minilora.lab import compare, finetune
from minilora.lab.settings import Comparison, Grid, Settings
from minilora.methods import lora

KINDS = {"train": Settings, "compare": Comparison, "sweep": Grid}


def parsed(line):
    return cli.build_parser().parse_args(line.split())


def settings_of(line, monkeypatch):
    """(Settings, out, overwrite) that ``minilora train`` hands on for a command line."""
    handed = []
    monkeypatch.setattr(finetune, "finetune", lambda *arguments: handed.append(arguments))
    assert cli.main(line.split()) == 0
    return handed[0]


# ------------------------------------------------------------------------------------------------ one definition


@pytest.mark.parametrize("command", KINDS)
def test_each_setting_has_a_flag_with_its_help_and_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(KINDS[command]):
        if help := f.metadata.get("help"):
            flag = f.metadata["flag"] or "--" + f.name.replace("_", "-")
            assert re.search(rf"{flag}\b.* {re.escape(help)}", printed), f.name
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if default not in (None, False):
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                assert f"{help} (default: {shown})" in printed


def test_without_flags_the_settings_are_the_defaults(monkeypatch):
    assert settings_of("train lora", monkeypatch) == (Settings("lora"), "runs/train", False)


def test_every_flag_reaches_its_setting(monkeypatch):
    line = ("train lora --r 4 --alpha 8 --data my.txt --replace-unknown ? --target-modules q,v --steps 3 --lr 0.1 "
            "--batch 2 --warmup 1 --weight-decay 0.2 --clip 3 --base b.safetensors --seed 5 --device cuda --workers 2 "
            "--micro-batches 2 --recompute --checkpoint-every 7 --out here --overwrite")  # fmt: skip
    settings, out, overwrite = settings_of(line, monkeypatch)
    assert (out, overwrite) == ("here", True)
    assert settings == Settings(
        "lora", {"r": 4, "alpha": 8.0}, data="my.txt", replace="?", targets=["q", "v"], steps=3, lr=0.1, batch=2,
        warmup=1, weight_decay=0.2, clip=3.0, base="b.safetensors", seed=5, device="cuda", workers=2, micro_batches=2,
        recompute=True, every=7,
    )  # fmt: skip
    own = {f.name for f in dataclasses.fields(Settings) if f.metadata.get("help")}
    assert not [name for name in own if getattr(settings, name) == getattr(Settings("lora"), name)]  # none left out
    assert Settings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_compare_takes_names_with_commas_and_without(monkeypatch):
    handed = []
    monkeypatch.setattr(compare, "compare", lambda *arguments: handed.append(arguments))
    assert cli.main(["compare", "--methods", "lora,vera", "dora", "--r", "4", "--out", "there"]) == 0
    assert handed == [(Comparison(methods=["lora", "vera", "dora"], r=4), "there")]


def test_values_become_pythons_own():
    found = Settings("lora", steps=np.int64(3), lr=1, clip=np.float32(0.5), targets=("q", "v"))
    assert [type(v) for v in (found.steps, found.lr, found.clip, found.targets)] == [int, float, float, list]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 1.0, "expected int"),
        ("steps", True, "expected int"),
        ("steps", 0, "above 0"),
        ("lr", "fast", "expected float | None"),
        ("lr", float("nan"), "above 0"),
        ("warmup", -1, "at least 0"),
        ("recompute", 1, "expected bool"),
        ("targets", [1], "expected str | list[str]"),
        ("lr", 10**400, "expected float | None"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_where_it_enters(name, value, expected):
    with pytest.raises(InputError, match=f"^{name} is .*{re.escape(expected)}"):
        Settings("lora", **{name: value})


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --out lora vera", ("vera", {}, "lora")),
        ("train --data lora delta_lora", ("delta_lora", {}, "runs/train")),
        ("train --out full lora --r 4", ("lora", {"r": 4}, "full")),
        ("train lora --r 4 --out vera", ("lora", {"r": 4}, "vera")),
        ("train --steps 5 lora --steps 7 --out=dora", ("lora", {}, "dora")),
    ],
)
def test_a_flag_s_word_is_not_taken_for_the_method(line, expected, monkeypatch):
    settings, out, _ = settings_of(line, monkeypatch)
    assert (settings.method, settings.options, out) == expected
    assert settings.data == ("lora" if "--data" in line else None)
    assert settings.steps == (7 if "--steps" in line else 150)  # the last one counts


@pytest.mark.parametrize("name", methods.names())
def test_a_method_s_own_options_are_listed_and_taken(name, capsys):
    with pytest.raises(SystemExit):
        parsed(f"train {name} --help")
    printed = capsys.readouterr().out
    for f in dataclasses.fields(methods.get(name)):
        flag = "--" + f.name.replace("_", "-")
        word = "" if isinstance(f.default, bool) else "3"
        assert flag in printed and str(f.default) in printed
        assert getattr(parsed(f"train {name} {flag} {word}"), f.name) == (type(f.default)(word) if word else True)


def test_a_method_s_options_may_be_of_any_type_and_have_a_help_text(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Fancy(lora.LoRA):
        bias: bool = dataclasses.field(default=False, metadata={"help": "train the bias too"})
        merged: bool = True
        kind: str = "gaussian"
        ranks: "list[int] | None" = None
        modes: tuple[str, ...] = ()

    monkeypatch.setattr(methods, "get", lambda name: Fancy)
    args = parsed("train lora --bias --no-merged --kind zero --ranks 1 2 --modes a b")
    assert (args.bias, args.merged, args.kind, args.ranks, args.modes) == (True, False, "zero", [1, 2], ["a", "b"])
    with pytest.raises(SystemExit):
        parsed("train lora --help")
    assert "train the bias too" in capsys.readouterr().out
