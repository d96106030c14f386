"""Files that travel: PEFT and transformers read what minilora wrote, minilora reads what they wrote, and both agree.

The judge is a transformers GPT-2 with every array random, adapters trained on it by PEFT, and the logits of each.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TorchGPT, assert_close, copy_to_torch, to_numpy, to_torch
from hra import HRA
from safetensors.numpy import load_file

import minilora
from minilora import methods
from minilora.cli import main
from minilora.engine import no_grad
from minilora.files.base import fingerprint, load_base
from minilora.files.checkpoint import load_adapter, save_adapter
from minilora.files.gpt2 import load_gpt2, save_gpt2
from minilora.files.peft import base_weights, layouts, load_peft, save_peft
from minilora.lab import finetune
from minilora.merging import merge_and_unload
from minilora.surgery import adapted_layers

REASON = "needs torch, PEFT and transformers: pip install 'minilora[oracle]'"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
pytestmark = [
    pytest.mark.oracle,
    # PEFT asks an attribute that transformers has renamed, and sets fan_in_fan_out for Conv1D by itself.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

V, T, STEPS = 61, 16, 4
IDS = np.random.default_rng(1).integers(0, V, (3, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 that transformers wrote; no array in it is all 0 or all 1."""
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
    path = tmp_path_factory.mktemp("gpt2") / "base"
    model.save_pretrained(path)
    return path


def theirs_of(folder, dtype=torch.float32):
    model, report = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report  # no key too many, none missing, none of another shape
    return model.eval()


def logits(model, ids=IDS):
    """(N, V), of either library."""
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return to_numpy(model(to_torch(ids)).logits).reshape(-1, V)
    with no_grad():
        return model(ids).data


def assert_same_logits(ours, theirs, tolerance=1e-6):
    assert_close(logits(ours), logits(theirs), tolerance, "logits")


def assert_same_tensors(*files):
    """The same names, and under each the same bytes."""
    one, other = ({name: array.tobytes() for name, array in load_file(file).items()} for file in files)
    assert one == other


def trained_by_peft(folder, config, seed=0):
    """A PEFT model after a few steps of AdamW."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(theirs_of(folder), config)
    rate = 0.3 if config.peft_type == "VERA" else 0.02  # b starts at 0, and d at 0.1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(to_torch(IDS), labels=to_torch(IDS)).loss.backward()
        optimizer.step()
    return model.eval()


def trained_here(model, name, targets="all-linear", **options):
    options = {"r": 3, "start_step": 1, **options}
    minilora.adapt(model, name, targets, verbose=False, **{k: v for k, v in options.items() if k.endswith("pattern")},
                   **methods.known(name, **options))  # fmt: skip
    optimizer = minilora.AdamW(model.trainable(), lr=0.3 if name == "vera" else 0.02)
    minilora.train(model, optimizer, iter([(IDS, np.roll(IDS, -1, 1))] * STEPS), STEPS, progress=False)
    return model


# ---------------------------------------------------------------------------------------------- transformers' GPT-2


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in ("with a head", "without", "in shards")),
        *(("with a head", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ],
)
def test_a_gpt2_of_transformers_is_the_same_here_in_float32(folder, tmp_path, kind, dtype):
    theirs = theirs_of(folder, dtype)
    saved = theirs.transformer if kind == "without" else theirs
    saved.save_pretrained(tmp_path, max_shard_size="30KB" if kind == "in shards" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if kind != "in shards" else 5)
    assert_same_logits(load_base(tmp_path), theirs.float())


def test_what_is_written_here_transformers_reads(folder, tmp_path):
    save_gpt2(tmp_path, load_gpt2(folder))
    np.testing.assert_array_equal(logits(theirs_of(tmp_path)), logits(theirs_of(folder)))
    assert_same_tensors(folder / "model.safetensors", tmp_path / "model.safetensors")


def test_the_shipped_model_in_transformers(tmp_path):
    model = minilora.pretrained()
    save_gpt2(tmp_path, model)
    ids = np.random.default_rng(2).integers(0, 96, (2, 64))
    with no_grad(), torch.no_grad():
        theirs = to_numpy(theirs_of(tmp_path)(to_torch(ids)).logits).reshape(-1, 96)
        assert_close(model(ids).data, theirs, 1e-6, "logits")


# ------------------------------------------------------------------------------------------- what PEFT trained, here

LORA = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
ALL = {**LORA, "target_modules": "all-linear"}
REGEX = r"transformer\.h\.\d\.(attn\.c_attn|mlp\.c_proj)"
FROM_PEFT = {
    "lora": lambda: peft.LoraConfig(**ALL),
    "lora of c_attn": lambda: peft.LoraConfig(**LORA, target_modules=["c_attn"]),
    "lora of both c_proj": lambda: peft.LoraConfig(**LORA, target_modules=["c_proj"]),
    "lora of one c_proj": lambda: peft.LoraConfig(**LORA, target_modules=["h.1.mlp.c_proj"]),
    "lora by expression": lambda: peft.LoraConfig(**LORA, target_modules=REGEX),
    "lora with exclusions": lambda: peft.LoraConfig(**ALL, exclude_modules=["mlp.c_proj"]),
    "lora of one block": lambda: peft.LoraConfig(
        **LORA, target_modules=["c_attn", "c_fc"], layers_to_transform=[1], layers_pattern="h"
    ),
    "lora with patterns": lambda: peft.LoraConfig(
        **ALL,
        rank_pattern={"h.0.attn.c_attn": 7, "mlp.c_proj": 2, r"h\.\d\.attn\.c_proj": 4},
        alpha_pattern={r"h\.\d\.attn\.c_attn": 9, "c_fc": 2.5},
    ),
    "lora, gaussian, dropout": lambda: peft.LoraConfig(**ALL, init_lora_weights="gaussian", lora_dropout=0.3),
    "rslora": lambda: peft.LoraConfig(**ALL, use_rslora=True),
    "rslora with patterns": lambda: peft.LoraConfig(**ALL, use_rslora=True, rank_pattern={"c_attn": 5}),
    "dora": lambda: peft.LoraConfig(**ALL, use_dora=True),
    "dora of c_attn": lambda: peft.LoraConfig(**LORA, target_modules=["c_attn"], use_dora=True),
    "dora and rslora": lambda: peft.LoraConfig(**ALL, use_dora=True, use_rslora=True),
    "vera": lambda: peft.VeraConfig(
        r=5, target_modules=["c_attn", "c_proj", "c_fc"], projection_prng_key=7, task_type="CAUSAL_LM"
    ),
    "vera without projections": lambda: peft.VeraConfig(
        r=5, target_modules=["c_attn", "c_fc"], projection_prng_key=7, save_projection=False, task_type="CAUSAL_LM"
    ),
    "vera of c_attn": lambda: peft.VeraConfig(r=40, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    "vera of c_fc": lambda: peft.VeraConfig(r=40, target_modules=["c_fc"], task_type="CAUSAL_LM"),
}
every_file = pytest.mark.parametrize("kind", FROM_PEFT)


@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning")
@every_file
def test_what_peft_trained_gives_its_logits_here_and_the_same_tensors_again(folder, tmp_path, kind):
    theirs = trained_by_peft(folder, FROM_PEFT[kind]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_peft(tmp_path / "theirs", load_gpt2(folder))
    assert np.abs(logits(ours) - logits(load_gpt2(folder))).max() > 0.05  # the adapter does something
    assert_same_logits(ours, theirs)
    save_peft(tmp_path / "again", ours, save_projection="without" not in kind)
    assert_same_tensors(*(tmp_path / which / "adapter_model.safetensors" for which in ("theirs", "again")))
    assert_same_logits(ours, peft.PeftModel.from_pretrained(theirs_of(folder), tmp_path / "again").eval())

    save_adapter(tmp_path / "own", ours, fingerprint(load_gpt2(folder)))
    np.testing.assert_array_equal(logits(load_adapter(tmp_path / "own", load_gpt2(folder))), logits(ours))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 6}}], ids=str)
def test_pissa_unconverted_is_the_residual_here_too(folder, tmp_path, options):
    """PEFT decomposes in float32, and here it is float64: the residuals are as near as float32's vectors are."""
    theirs = trained_by_peft(folder, peft.LoraConfig(**ALL, init_lora_weights="pissa", **options))
    theirs.save_pretrained(tmp_path)
    ours = load_peft(tmp_path, load_gpt2(folder))
    assert {layer.method.name for layer in adapted_layers(ours).values()} == {"pissa"}
    assert_same_logits(ours, theirs, 5e-6)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_converted_by_peft_equals_the_conversion_here(folder, tmp_path):
    """The update, W' − W, to the rounding of PEFT's singular vectors, which is that of float32 · σ₁ / (σ_r − σ_r₊₁)."""
    torch.manual_seed(0)
    start = peft.get_peft_model(theirs_of(folder), peft.LoraConfig(**ALL, init_lora_weights="pissa"))
    start.peft_config["default"].init_lora_weights = True  # as PEFT's page on PiSSA has it
    start.save_pretrained(tmp_path / "start")
    theirs = trained_by_peft(folder, peft.LoraConfig(**ALL, init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path / "unconverted")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    save_peft(tmp_path / "ours", load_peft(tmp_path / "unconverted", load_gpt2(folder)))

    converted = load_peft(tmp_path / "converted", load_gpt2(folder))
    ours = load_peft(tmp_path / "ours", load_gpt2(folder))
    assert_same_logits(converted, theirs, 5e-6)
    change = lambda layer: layer.method.merge(layer.base.W.data, layer.p) - layer.base.W.data
    for module, paths in layouts(ours)["gpt2"].items():
        one, other = (np.concatenate([change(adapted_layers(m)[path]) for path in paths]) for m in (ours, converted))
        sigma = np.linalg.svd(np.concatenate([base_weights(ours)[path] for path in paths]), compute_uv=False)
        assert_close(one, other, 1e-6, module, scale=sigma[0] ** 2 / (sigma[2] - sigma[3]))
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] <= 18  # 3 · 2 r, of q, k and v


# -------------------------------------------------------------------------------------------- what was trained here

ALL_LINEAR = {"targets": "all-linear"}
PATTERNS = {"rank_pattern": {"blocks.0.q": 5, "up": 2}, "alpha_pattern": {"k": 4.0, "blocks.1.down": 8.0}}
TRAINED = [  # (method, targets and options, options of save_peft)
    *((name, ALL_LINEAR, {}) for name in methods.names() if name not in ("full", "vera")),
    *(
        (name, {"targets": targets}, {})
        for name in ("lora", "dora", "pissa")
        for targets in (["q", "v"], ["down"], ["blocks.1.o", "blocks.1.up"])
    ),
    *((name, ALL_LINEAR | PATTERNS, {}) for name in ("lora", "rslora", "dora", "pissa")),
    *(("vera", {"targets": targets, "r": 40}, {}) for targets in (["o", "up", "down"], ["up"])),
    *((name, ALL_LINEAR | {"r": 5}, {"form": "lora"}) for name in ("vera", "lora_plus", "rslora", "delta_lora")),
]


def in_peft(folder, path):
    return peft.PeftModel.from_pretrained(theirs_of(folder), path).eval()


@pytest.mark.parametrize(("name", "options", "form"), TRAINED, ids=str)
def test_what_was_trained_here_gives_the_same_logits_in_peft(folder, tmp_path, name, options, form):
    ours = trained_here(load_gpt2(folder), name, **options)
    assert np.abs(logits(ours) - logits(load_gpt2(folder))).max() > 0.05
    config = save_peft(tmp_path, ours, **form)
    assert not form or (config["peft_type"] == "LORA" and not config["use_rslora"])
    assert_same_logits(ours, in_peft(folder, tmp_path))


@pytest.mark.parametrize("name", methods.names())
def test_any_method_merged(folder, tmp_path, name):
    ours = trained_here(load_gpt2(folder), name)
    save_peft(tmp_path, ours, form="merged")
    assert_same_logits(merge_and_unload(ours), theirs_of(tmp_path))


@pytest.mark.parametrize("name", ["rslora", "dora", "vera", "delta_lora"])
def test_under_our_own_names(tmp_path, name):
    """For a torch model whose modules are named as here: VeRA's q, k and v go over as they are."""
    config = minilora.GPTConfig(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2)
    ours, theirs = minilora.GPT(config, rng=0), TorchGPT(config)
    for _, p in ours.named_parameters():
        p.data += np.random.default_rng(0).normal(0.0, 0.2, p.shape).astype(np.float32)
    copy_to_torch(ours, theirs)
    trained_here(ours, name)
    save_peft(tmp_path, ours, names="minilora")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        assert_close(logits(ours), theirs(to_torch(IDS)), 1e-6, "logits")


def test_the_page_s_commands_and_its_lines_for_peft(tmp_path, monkeypatch):
    """docs/peft.md, from the command line to PEFT's model: the shipped model with the adapter that was trained."""
    page = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
    block = lambda mark, kind: re.search(rf"{mark}\n```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")  # takes longer than the training
    for line in block("<!-- commands -->", "sh").splitlines()[:2]:
        assert main(shlex.split(line)[1:]) == 0
    namespace = {}
    exec(compile(block("<!-- with PEFT -->", "python"), "docs/peft.md", "exec"), namespace)
    ids = np.random.default_rng(2).integers(0, 96, (2, 64))
    ours = load_adapter("runs/lora/adapter.safetensors", minilora.pretrained())
    with no_grad(), torch.no_grad():
        theirs = to_numpy(namespace["model"].eval()(to_torch(ids)).logits).reshape(-1, 96)
        assert_close(ours(ids).data, theirs, 1e-6, "logits")


@pytest.mark.parametrize("name", ["lora", "rslora", "dora_detached"])
def test_peft_goes_on_training_where_we_stopped(folder, tmp_path, name):
    """A file is more than its outputs: A, B and m arrive as parameters with the gradients that they have here."""
    ours = trained_here(load_gpt2(folder), name, ["o", "up"])
    save_peft(tmp_path, ours)
    theirs = peft.PeftModel.from_pretrained(theirs_of(folder), tmp_path, is_trainable=True).eval()
    minilora.AdamW(ours.trainable(), lr=0.1).zero()  # of the last step's gradients
    minilora.backward(ours.loss(IDS[:, :-1], IDS[:, 1:]))
    theirs(to_torch(IDS), labels=to_torch(IDS)).loss.backward()
    trained = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == len(ours.trainable())
    for block, own in enumerate(ours.blocks):
        for module, layer in {"attn.c_proj": own.o, "mlp.c_fc": own.up}.items():
            at = f"base_model.model.transformer.h.{block}.{module}"
            assert_close(layer.arrays.A.grad, trained[f"{at}.lora_A.default.weight"], 1e-5, f"{at}: A")
            assert_close(layer.arrays.B.grad, trained[f"{at}.lora_B.default.weight"], 1e-5, f"{at}: B")
            if name == "dora_detached":
                m = trained[f"{at}.lora_magnitude_vector.default.weight"]
                assert_close(layer.arrays.m.grad, m, 1e-5, f"{at}: m")


def test_a_method_file_that_was_dropped_in_reads_what_peft_trained(tmp_path, monkeypatch):
    """HRA, of which minilora has nothing but this file: PEFT's tensors here, and ours there."""
    (tmp_path / "hra.py").write_text(HRA)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "minilora.methods.hra", raising=False)
    config = minilora.GPTConfig(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2)
    make = lambda: minilora.GPT(config, rng=0)
    theirs = TorchGPT(config)
    copy_to_torch(make(), theirs)
    targets = ["q", "k", "v", "o", "up", "down"]
    theirs = peft.get_peft_model(theirs, peft.HRAConfig(r=4, target_modules=targets, init_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_peft(tmp_path / "theirs", make())
    assert np.abs(logits(ours) - logits(make())).max() > 0.05
    save_peft(tmp_path / "again", ours, names="minilora")
    assert_same_tensors(*(tmp_path / which / "adapter_model.safetensors" for which in ("theirs", "again")))
    again = TorchGPT(config)
    copy_to_torch(make(), again)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "again").eval()
    with torch.no_grad():
        assert_close(logits(ours), theirs(to_torch(IDS)), 2e-6, "logits")
        assert_close(theirs(to_torch(IDS)), again(to_torch(IDS)), 0.0, "logits")
