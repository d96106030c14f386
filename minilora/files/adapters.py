"""Adapters wherever they lie: in a file, in the folder of a run, or in a folder of PEFT."""

from pathlib import Path

from . import checkpoint
from .peft import CONFIG, load_peft

ADAPTER = "adapter.safetensors"  # in the folder of a run


def load_adapter(path, model):
    """Put the adapter at ``path`` into ``model``, the base model that it was trained on; returns the model.

    ``path``: a file that save_adapter() wrote, the folder of a run of ``minilora train``, or a folder of PEFT.
    Raises AdapterFormatError, with the model as it was, for what is missing, foreign, or does not fit.
    """
    path = Path(path)
    if path.is_file() or path.suffix == Path(ADAPTER).suffix:
        return checkpoint.load_adapter(path, model)
    if (path / CONFIG).exists() and not (path / ADAPTER).exists():
        return load_peft(path, model)
    return checkpoint.load_adapter(path / ADAPTER, model)
