"""minilora.load_adapter takes a file, the folder of a run and a folder of PEFT alike."""

import numpy as np
import pytest

import minilora
from minilora import GPT, GPTConfig, adapt, save_peft
from minilora.files.base import fingerprint
from minilora.files.checkpoint import save_adapter
from minilora.files.errors import AdapterFormatError

pytestmark = pytest.mark.quick
CONFIG = GPTConfig(vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2)


def test_an_adapter_is_loaded_from_wherever_it_lies(tmp_path):
    base, ids = GPT(CONFIG), np.array([[1, 2, 3]])
    trained = adapt(GPT(CONFIG), "lora", r=2, verbose=False)
    for p in trained.trainable().values():
        p.data += 0.5
    run, theirs = tmp_path / "run", tmp_path / "peft"
    run.mkdir()
    save_adapter(run / "adapter.safetensors", trained, fingerprint(base))
    save_peft(theirs, trained)
    for place in (run / "adapter.safetensors", run, str(run), theirs):
        loaded = minilora.load_adapter(place, GPT(CONFIG))
        np.testing.assert_allclose(loaded(ids).data, trained(ids).data, rtol=1e-5)


def test_an_empty_folder_is_one_error(tmp_path):
    with pytest.raises(AdapterFormatError, match=r"adapter\.safetensors.*no such file"):
        minilora.load_adapter(tmp_path, GPT(CONFIG))
