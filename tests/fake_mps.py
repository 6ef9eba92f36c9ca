"""A pretended Apple GPU, for tests on a machine without one: it computes on the CPU, and refuses what MPS refuses.

Tensors "on it" say `device(type='mps')`, hold an ordinary tensor inside, and are carried along by every operation.  What no
Mac would let pass raises here, too: float64 on the device, tensors of two devices in one operation, numbers drawn on the device
from a generator of the CPU.  Convolutions of channels_last tensors are refused as well: torch has computed them wrongly or not
at all on MPS more than once (its issues 140902, 142344, 180984).  Whether Apple's own kernels are right, this cannot show.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps")
STANDS_FOR = torch.device("meta:1")  # a name that torch knows without a Mac; the package itself says "meta", without a number
MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::set_.source_Tensor")  # CPU beside MPS


class OnDevice(Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), device=STANDS_FOR, **like)
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return MPS

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """One operation: unwrapped, done on the CPU, and wrapped again if it belongs on the device."""
    name, leaves = func._schema.name, tree_flatten((args, kwargs))[0]
    here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim]
    if here and elsewhere and name not in MAY_MIX:
        raise RuntimeError(f"{name} was given tensors on mps and on cpu")
    asked = kwargs.get("device")
    stays = bool(here) if asked is None else asked == STANDS_FOR
    if name == "aten::copy_":
        stays = isinstance(args[0], OnDevice)
    if stays and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{name} on mps was given a generator of the CPU")
    if name == "aten::convolution" and here and any(_last(leaf.inner) for leaf in here):
        raise RuntimeError("a convolution on mps was given a tensor in channels_last")

    def unwrapped(leaf):
        if isinstance(leaf, Tensor):
            return leaf.inner if isinstance(leaf, OnDevice) else leaf
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf == STANDS_FOR else leaf

    def wrapped(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dtype == torch.float64:
            raise TypeError(f"{name} was to make float64 on mps")
        known = [given for given in here if given.inner is leaf]  # what an operation in place gives back
        return known[0] if known else OnDevice(leaf)

    out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    return tree_map(wrapped, out) if stays else out


def _last(x: Tensor) -> bool:
    """Whether a picture lies in memory channel by channel within each pixel, and cannot be taken for the usual order."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Dispatch(TorchDispatchMode):
    """Catches what makes tensors on the device from nothing, or from tensors of the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """Lets a torch that was built without MPS hear of the device by the name that it knows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def renamed(leaf):
            return STANDS_FOR if leaf in ("mps", MPS) else leaf

        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*_map(renamed, args), **_map(renamed, kwargs or {}))


def _map(function, tree):
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, str | torch.device) else leaf, tree)


@contextlib.contextmanager
def fake_mps() -> Iterator[torch.device]:
    """Within it `tensor.to("mps")` and the like work, as far as they would on a Mac.

    Functions under `@torch.inference_mode()` run without gradients only: tensors like these cannot be inference tensors.
    """

    def enter(self) -> None:
        self.gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(self, *_) -> None:
        torch.set_grad_enabled(self.gradients)

    with mock.patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave), _Dispatch(), _Function():
        yield MPS
