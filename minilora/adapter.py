"""What an adapter method is (Adapter), and the layer that hosts it in a network (AdaptedLinear).

A method is mathematics on plain arrays in one file of methods/. What a layer needs around it is here.
"""

from dataclasses import dataclass

import numpy as np

from .backend import array_module, to_device, to_host
from .engine import Saved, Tensor, form, is_recording, record
from .errors import InputError
from .nn import Linear, Module, Parameter
from .options import options_of, plain_value


@dataclass(frozen=True)
class Adapter:
    """The contract of a method file: hyper-parameters as fields, and no array, so nothing can hide in it.

    ``W (d_out, d_in)`` is the frozen weight, ``x (N, d_in)`` the input, ``p`` the layer's arrays (``p.A``, ``p["A"]``).
    A method has shapes, init, forward, backward and merge; the other members have defaults that suit most methods.
    """

    def shapes(self, d_out, d_in) -> tuple[dict, dict]:
        """(trainable, buffers): the arrays that init makes, as shapes by name."""
        raise NotImplementedError(f"{self.name} does not declare the shapes of its arrays")

    def init(self, W, rng, shared) -> tuple[dict, dict]:
        """(trainable, buffers): host arrays by name, drawn from ``rng``. ``W`` is a host copy that may be changed."""
        raise NotImplementedError

    def forward(self, x, W, p):
        """(y (N, d_out), saved): saved is a dict of all that backward needs, apart from W and p."""
        raise NotImplementedError

    def backward(self, dy, saved, W, p):
        """(dx (N, d_in), grads): grads has the names of the trainable arrays."""
        raise NotImplementedError

    def merge(self, W, p):
        """The weight (d_out, d_in) that does the same in one product: forward(x) equals x @ merge(W, p).T."""
        raise NotImplementedError

    claims = {}  # sentence: function of a trial.Trial that is true if the sentence holds
    integers = ()  # names of the buffers that hold integers; they keep their dtype
    updates_base = False  # True: init or after_step changes W, and the layer gets its own copy of it
    starts_elsewhere = ""  # the reason why the adapted layer does not start as the base model
    note = ""  # half a sentence for the table of minilora compare, such as what the method adds in memory
    holomorphic = True  # False: the complex step cannot be taken, and the method's file says why
    # What files/peft.py has to know of a method; docs/peft.md explains each.
    peft, from_peft, is_product, peft_rescales, peft_shared_key = {}, False, False, False, ""
    peft_names, peft_patterns, peft_arrays, peft_keys, peft_ignored = {}, {}, {}, {}, {}

    def __init_subclass__(cls):  # a subclass computes something else than its parent: PEFT's name is not inherited
        cls.peft, cls.from_peft = vars(cls).get("peft", {}), vars(cls).get("from_peft", False)

    def __post_init__(self):
        """Raises InputError for a value that its field does not take; see options.plain_value()."""
        for name, (kind, default) in options_of(type(self)).items():
            object.__setattr__(self, name, plain_value(self.name, name, kind, default, getattr(self, name)))

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def check_layer(self, layer: str, shape):
        """Raise InputError if the method cannot adapt a layer of ``shape`` (d_out, d_in)."""
        r = getattr(self, "r", 1)
        if r > min(shape):
            raise InputError(f"{self.name}: r={r} is larger than {layer} allows, {tuple(shape)}: at most {min(shape)}")

    def shared_shapes(self, d_out, d_in) -> dict:
        """The shapes of the arrays that init_shared makes, for layers of at most (d_out, d_in)."""
        return {}

    def init_shared(self, shapes, rng) -> dict:
        """Arrays that all layers share, once per adapt(); ``shapes`` are the layers' (d_out, d_in)."""
        return {}

    def surrogate(self, x, W, p, at):
        """The function of (x, p) whose gradient backward computes at p = ``at``: forward's y, unless by design not."""
        return self.forward(x, W, p)[0]

    def factors(self, W, p):
        """(B (d_out, k), A (k, d_in)) with merge(W, p) = W + B A, or None if the update is not a low-rank product."""
        return None

    def lr_scale(self, name) -> float:
        """Factor on the learning rate of the trainable array ``name``."""
        return 1.0

    def after_step(self, W, p) -> None:
        """Called after each optimizer step."""


class AdaptedLinear(Module):
    """A frozen Linear with an adapter method beside it: the method's host in the network."""

    arrays_beside = ("merged", "original")
    forms = {}  # {"numpy" or "cupy": a faster host(layer, x)}, registered by fast/

    def __init__(self, base: Linear, method: Adapter, seed, shared=None, part=None):
        """``shared``: Parameters from init_shared; ``part`` {name: slice}: the rows of one that this layer sees."""
        self.method, self.base, self.part = method, base, part or {}
        self.merged, self.original = None, base.W.data
        base.freeze()
        self.shared, xp, dtype = shared or {}, array_module(base.W.data), base.W.dtype
        W, shared = np.array(to_host(base.W.data)), Saved((k, to_host(a)) for k, a in self.seen().items())
        trainable, buffers = method.init(W, np.random.default_rng(seed), shared)
        self.arrays = Module()
        for name, array in trainable.items():
            setattr(self.arrays, name, Parameter(own_array(array, xp, dtype), lr_scale=method.lr_scale(name)))
        for name, array in buffers.items():
            setattr(self.arrays, name, Parameter(own_array(array, xp, dtype), requires_grad=False))
        if method.updates_base:
            base.W.data = own_array(W, xp, dtype)

    def seen(self) -> dict:
        """The shared arrays, or this layer's part of them."""
        return {k: t.data[self.part[k]] if k in self.part else t.data for k, t in self.shared.items()}

    @property
    def p(self) -> Saved:
        """The layer's arrays by name, trainable, buffers and shared alike."""
        return Saved({**self.seen(), **{name: t.data for name, t in vars(self.arrays).items()}})

    def __call__(self, x: Tensor) -> Tensor:
        """Raises InputError for a wrong shape, dtype or device, RuntimeError when a merged layer is trained."""
        if self.merged is None:
            return form(self.forms, x.data, AdaptedLinear.host)(self, x)
        if is_recording():
            raise RuntimeError("this layer is merged and would not train; call unmerge(model) first")
        self.check(x)
        y = x.data @ self.merged.T
        return Tensor(y if self.base.b is None else y + self.base.b.data)

    def host(self, x: Tensor) -> Tensor:
        """Call the method, add the layer's bias, and record how to go back."""
        self.check(x)
        method, W, b = self.method, self.base.W.data, self.base.b
        y, saved = method.forward(x.data, W, self.p)
        if b is not None:
            y = y + b.data  # not +=, since y may be one of the saved arrays
        trained = self.arrays.trainable()
        names = list(trained)

        def vjp(dy, saved):
            dx, grads = method.backward(dy, saved, self.base.W.data, self.p)
            return dx, *(grads[name] for name in names)

        return record(method.name, y, saved, vjp, [x, *trained.values()])

    def check(self, x: Tensor) -> None:
        W, name = self.base.W.data, self.method.name
        if x.data.ndim != 2 or x.shape[1] != W.shape[1] or x.dtype != W.dtype:
            raise InputError(f"{name}: x is {x.dtype}{x.shape}; this layer takes {W.dtype} (N, {W.shape[1]})")
        array_module(x.data, W)

    def after_step(self):
        self.method.after_step(self.base.W.data, self.p)


def own_array(array, xp, dtype):
    """A host array as a contiguous one of the model's library and dtype; integers and booleans keep theirs."""
    return xp.ascontiguousarray(to_device(array, xp), cast_to(array, dtype))


def cast_to(array, dtype):
    """The dtype of ``array`` in a layer of ``dtype``: that one, unless the array holds integers or booleans."""
    return array.dtype if array.dtype.kind in "iub" else dtype
