"""Several adapters on one base model: switch between them, turn them off, and add their updates up.

The base weights are in memory once; an adapter at rest is its adapted layers, which switching puts into the model.
"""

from contextlib import contextmanager
from numbers import Real

import numpy as np

from . import methods
from .adapter import AdaptedLinear, own_array
from .backend import array_module
from .errors import InputError, nearest, shown
from .files.checkpoint import load_adapter
from .nn import Linear, Module
from .surgery import adapt, adapted_layers, host, linear_layers, parent_of

BASE = {}, None  # the layers and shared arrays of no adapter
LARGEST = float(np.finfo(np.float32).max)  # the largest weight of a sum


class Adapters:
    """Named adapters of a base model, of which one at most is active, that is, in the model; iterates over the names.

    The model stays frozen, with and without an active adapter. What works on an adapted model, such as train(),
    generate(), merge() and save_adapter(), works on the active one. unload() and merge_and_unload() leave a model
    without adapters, and end this object's use of it. A call that fails leaves model and adapters as they were.
    Raises InputError for a model that is adapted already.
    """

    def __init__(self, model: Module):
        if adapted_layers(model):
            raise InputError("Adapters: this model is adapted already; give the base model, then add() or load()")
        model.freeze()
        self.model, self.linears = model, linear_layers(model)
        self.active: str | None = None
        self.held = {}  # name: ({path: AdaptedLinear}, the Module of shared arrays or None)

    def __iter__(self):
        return iter(self.held)

    def add(self, name: str, method, *args, **options) -> None:
        """adapt(model, method, …) for a new active adapter. Raises adapt()'s errors, InputError for a taken name."""
        self.take_in(name, lambda: adapt(self.model, method, *args, **options))

    def load(self, name: str, path) -> None:
        """A save_adapter() file as a new active adapter. Raises load_adapter()'s errors, and as add() does."""
        self.take_in(name, lambda: load_adapter(path, self.model))

    def combine(self, name: str, weights: dict) -> None:
        """A LoRA with the update Σ w · (update of the adapter) over ``weights`` {name: w}, as a new active adapter.

        Raises InputError for a name that is taken or unknown, weights that are not finite, and adapters whose update
        is not a thin product beside the base weight.
        """
        if not isinstance(weights, dict) or not weights:
            raise InputError("combine: the weights must be a dict {name: weight} with at least one adapter in it")
        self.use(self.active)  # brings all to one device
        for summand, weight in weights.items():
            self.check_known(summand)
            check_summand(summand, weight, self.held[summand][0].values())
        products = {}
        for path in self.linears:
            terms = [(float(w), self.held[n][0][path]) for n, w in weights.items() if path in self.held[n][0]]
            if terms:
                products[path] = weighted_sum(terms)
        self.take_in(name, lambda: host_products(self.model, products))

    def use(self, name: str | None) -> None:
        """Make ``name`` the active adapter, or with None the base model alone. Raises InputError for an unknown name.

        Where model.to() has moved the model, all other adapters follow it now.
        """
        if name is not None:
            self.check_known(name)
        if adapted_layers(self.model) != self.held.get(self.active, BASE)[0]:
            raise InputError("Adapters: adapt() or unload() has changed this model since; make a new Adapters(model)")
        self.follow()
        self.place(name)

    @contextmanager
    def disabled(self):
        """The base model alone inside ``with``, and afterwards the adapter that was active before."""
        before = self.active
        self.use(None)
        try:
            yield
        finally:
            self.use(before if before in self.held else None)

    def remove(self, name: str) -> None:
        """Forget an adapter; where it is active, the base model is left. Raises InputError for an unknown name."""
        self.check_known(name)
        if name == self.active:
            self.use(None)
        del self.held[name]

    def take_in(self, name, put) -> None:
        """Let ``put`` adapt the base model, and hold what it made as the adapter ``name``: all or nothing."""
        if not isinstance(name, str) or not name:
            raise InputError(f"Adapters: the name {name!r} cannot be used; give a text that is not empty")
        if name in self.held:
            raise InputError(f"Adapters: there is an adapter {shown(name)} already; remove() it or take another name")
        before = self.active
        self.use(None)
        weights = {path: linear.W.data for path, linear in self.linears.items()}
        try:
            put()
        except BaseException:
            for path, W in weights.items():
                self.linears[path].W.data = W
            self.place(before)
            raise
        layers = adapted_layers(self.model)
        for layer in layers.values():
            part_from_base(layer)
        self.held[name], self.active = (layers, vars(self.model).get("shared")), name

    def place(self, name: str | None) -> None:
        """Put the layers of ``name`` into the model, and the base's own everywhere else."""
        layers, shared = self.held.get(name, BASE)
        for path, linear in self.linears.items():
            parent, attribute = parent_of(self.model, path)
            setattr(parent, attribute, layers.get(path, linear))
        vars(self.model).pop("shared", None)
        if shared is not None:
            self.model.shared = shared
        self.active = name

    def follow(self) -> None:
        """Move what is not in the model to where the model is; an array that several refer to stays one."""
        rest = Module()
        rest.parts = list(self.linears.values())
        for layers, shared in self.held.values():
            rest.parts += [*layers.values(), shared]
            for path, layer in layers.items():
                layer.original = self.linears[path].W.data
        _, p = next(self.model.named_parameters())
        rest.to("cpu" if array_module(p.data) is np else "cuda")

    def check_known(self, name) -> None:
        if name not in self.held:
            known = f"{nearest(name, self)}; there are {', '.join(self) or 'none'}"
            raise InputError(f"Adapters: no adapter is called {shown(str(name))}{known}")


def check_summand(name, weight, layers) -> None:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not abs(weight) <= LARGEST:
        raise InputError(f"combine: the weight of {shown(name)} is {weight!r}; it must be a finite number")
    for layer in layers:
        why = "its update is not a thin product"
        if layer.method.updates_base:
            why = "it moves the base weight too; make it a LoRA first (minilora export --form lora, minilora import)"
        elif layer.method.factors(layer.base.W.data, layer.p) is not None:
            continue
        raise InputError(f"combine: {shown(name)} ({layer.method.name}) cannot be added up: {why}")


def part_from_base(layer: AdaptedLinear) -> None:
    """Where the method has a W of its own, give the layer a Linear for it, and the base its weight back."""
    if layer.base.W.data is not layer.original:
        own = Linear(layer.base.W.data)
        own.b = layer.base.b
        own.freeze()
        layer.base.W.data, layer.base = layer.original, own


def weighted_sum(terms: list):
    """(B (d_out, r), A (r, d_in)) with B A = Σ w · (the layer's update) over the (w, AdaptedLinear) of ``terms``.

    The factors stand side by side, [w₁ B₁, w₂ B₂ …] and [A₁; A₂ …], so that no B meets another's A.
    """
    factors = [(w, *layer.method.factors(layer.base.W.data, layer.p)) for w, layer in terms]
    xp = array_module(*(A for _, _, A in factors))
    B = xp.concatenate([w * B for w, B, _ in factors], axis=1)  # (d_out, r)
    A = xp.concatenate([A for _, _, A in factors], axis=0)  # (r, d_in)
    d_out, d_in = len(B), A.shape[1]
    if len(A) <= min(d_out, d_in):
        return B, A
    update = B @ A  # (d_out, d_in), now smaller than its factors
    identity = own_array(np.eye(min(d_out, d_in)), xp, B.dtype)
    return (identity, update) if d_out <= d_in else (update, identity)


def host_products(model: Module, products: dict) -> None:
    """Adapt the base model by the given (B, A), by path, whose product is the layer's update."""
    made = {path: methods.low_rank(B, A) for path, (B, A) in products.items()}
    host(model, {path: method for path, (method, _) in made.items()})
    for path, layer in adapted_layers(model).items():
        for name, array in made[path][1].items():
            getattr(layer.arrays, name).data = array
