"""Who keeps which bytes for the backward pass: the graph's ``saved``, added up with each owner counted once.

Because a node holds nothing but its saved arrays, this list is the whole truth, and a test holds its total against
what the allocator says.
"""

from dataclasses import dataclass

from .engine import Tensor, nodes_of


@dataclass(frozen=True)
class Entry:
    """One kept array: the operation that keeps it, its name there, its shape, and bytes that nobody counted before."""

    operation: str
    name: str
    shape: tuple
    nbytes: int


def owner(array):
    """The array that owns the memory of a view."""
    while type(getattr(array, "base", None)) is type(array):
        array = array.base
    return array


def ledger(result: Tensor, model=None) -> list[Entry]:
    """What the graph below ``result`` keeps, in order of the forward pass. Call it before backward.

    An array that several operations keep counts at the first; a model's own parameters count nowhere.
    """
    seen = {id(owner(p.data)) for _, p in model.named_parameters()} if model is not None else set()
    return [entry for node in nodes_of(result) for entry in entries_of(node, seen)]


def entries_of(node, seen: set) -> list[Entry]:
    """What one node keeps; ``seen`` holds the ids of the owners counted so far, and takes this node's."""
    entries = []
    for name, value in arrays_of(node.saved):
        array = owner(value)
        entries.append(Entry(node.name, name, value.shape, 0 if id(array) in seen else array.nbytes))
        seen.add(id(array))
    return entries


def arrays_of(saved) -> list[tuple]:
    """(name, array) for each array among what a node saved; numbers and shapes are left out."""
    found = []
    for name, value in (saved or {}).items():
        for item in value if isinstance(value, tuple) else [value]:
            if hasattr(item, "nbytes") and getattr(item, "shape", ()):
                found.append((name, item))
    return found


def kept_bytes(result: Tensor, model=None) -> int:
    """Bytes kept for backward by the graph below ``result``, parameters of ``model`` excluded."""
    return sum(entry.nbytes for entry in ledger(result, model))
