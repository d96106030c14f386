"""Folding adapters into the weights, and taking them out of a model again."""

from .nn import Linear, Module
from .surgery import adapted_layers, parent_of


def merge(model: Module) -> None:
    """Fold each adapter into one weight for inference: no product more than the base model has."""
    for layer in adapted_layers(model).values():
        layer.merged = layer.method.merge(layer.base.W.data, layer.p)


def unmerge(model: Module) -> None:
    """Undo merge() exactly: the base weight was never touched, so it is the same to the bit."""
    for layer in adapted_layers(model).values():
        layer.merged = None


def unload(model: Module) -> Module:
    """Take the adapters out again: the base model with the weights it had before adapt(), frozen; returns the model."""
    for name, layer in adapted_layers(model).items():
        parent, attribute = parent_of(model, name)
        layer.base.W.data = layer.original
        setattr(parent, attribute, layer.base)
    vars(model).pop("shared", None)
    return model


def merge_and_unload(model: Module) -> Module:
    """Replace each adapted layer by a plain Linear with the merged weight; returns the model."""
    for name, layer in adapted_layers(model).items():
        parent, attribute = parent_of(model, name)
        plain = Linear(layer.method.merge(layer.base.W.data, layer.p))
        plain.b = layer.base.b
        plain.freeze()
        setattr(parent, attribute, plain)
    vars(model).pop("shared", None)
    return model
