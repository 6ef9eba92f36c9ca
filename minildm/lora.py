"""LoRA: teach a finished network something new by adding a thin product of two matrices to some of its layers.

A fine-tuning hardly needs the full rank of the matrices it changes.  So the matrix W stays as it is, and beside it two thin
ones are trained, B A in place of a whole update.  B starts at zero: before the first step the network is the one it was.
Several adapters can sit on one layer, each with a name and a scale of its own.  Hu et al. 2021, section 4.1.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """A frozen layer with low-rank updates beside it: y = W x + b + sum of scale alpha / rank B A x.  Hu et al. 2021, eq. 3.

    Of a convolution, A has the kernel and B is 1x1, as in kohya's files.

    Args:
        base: an nn.Linear or an nn.Conv2d of one group; it is frozen and used as it is.

    Raises:
        TypeError: base is another kind of layer.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        if not isinstance(base, nn.Linear | nn.Conv2d) or getattr(base, "groups", 1) != 1:
            raise TypeError(f"{base} is neither a linear layer nor a convolution of one group, which are what LoRA adds to")
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()  # A and B of each adapter
        self.alpha: dict[str, float] = {}
        self.scale: dict[str, float] = {}  # how much of each adapter is used; 1 is what it was trained for
        self.merged = False

    def add(self, name: str, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Adds an adapter that does nothing yet: A is random, B is zero.  One of the same name is replaced.

        Args:
            name: of the adapter.
            rank: how many directions it may use, at least 1.
            alpha: its update is weighted by alpha / rank, so that the learning rate need not change with the rank.
            generator: on the CPU, the source of A; None for torch's own.

        Raises:
            ValueError: rank is below 1, the name has a dot in it, or adapters are merged.
        """
        _check_new(name, rank, self)
        base = self.base
        if isinstance(base, nn.Conv2d):
            shape = {"kernel_size": base.kernel_size, "stride": base.stride, "dilation": base.dilation}
            shape |= {"padding": base.padding, "padding_mode": base.padding_mode}
            down = nn.Conv2d(base.in_channels, rank, bias=False, **shape)
            up = nn.Conv2d(rank, base.out_channels, kernel_size=1, bias=False)
        else:
            down = nn.Linear(base.in_features, rank, bias=False)
            up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(up.weight)
        self.down[name], self.up[name] = down.to(base.weight), up.to(base.weight)
        self.alpha[name], self.scale[name] = float(alpha), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """What the base takes to what it gives: (..., in_features), or (B, C, H, W)."""
        y = self.base(x)
        for name in () if self.merged else self.down:
            y = y + self.strength(name) * self.up[name](self.down[name](x))
        return y

    def strength(self, name: str) -> float:
        """What the product B A of an adapter is multiplied by: scale alpha / rank."""
        return self.scale[name] * self.alpha[name] / len(self.down[name].weight)

    @torch.no_grad()
    def update(self) -> Tensor:
        """What all adapters together add to the weight, in its shape."""
        total = torch.zeros_like(self.base.weight)
        for name, down in self.down.items():
            product = self.up[name].weight.flatten(1) @ down.weight.flatten(1)  # (out, rank) (rank, in) -> (out, in)
            total += self.strength(name) * product.view_as(total)
        return total

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its device or its shape."""
        return self.base.weight


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a network that can have an adapter, or has one: linear layers, convolutions, and what wraps them."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoRA))
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, LoRA | nn.Linear | nn.Conv2d) and not name.startswith(inside)
    }


def inject(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    name: str = "default",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freezes a network and gives some of its layers an adapter, which alone will be trained; earlier adapters are frozen too.

    Args:
        model: changed in place; what it computes stays the same to the bit.
        rank, alpha, generator: as in `LoRA.add`.
        targets: the layers: every linear layer and convolution whose dotted name is, or ends in, one of these; "to_q" say.
        name: of the adapter.

    Returns:
        The names of the layers that have the adapter now.

    Raises:
        ValueError: a target is the end of no such layer's name; or as `LoRA.add`.
    """
    targets, layers, found = list(targets), adaptable_layers(model), []
    for target in targets:
        matches = [layer for layer in layers if f".{layer}".endswith(f".{target}")]
        if not matches:
            known = sorted({layer.rpartition(".")[2] for layer in layers})
            raise ValueError(f"no linear layer or convolution is called {target!r}; there are {', '.join(known)}")
        found += matches
    found = list(dict.fromkeys(found))
    _check_new(name, rank, *(layers[layer] for layer in found))
    model.requires_grad_(False)
    for layer in found:
        _wrap(model, layer).add(name, rank, alpha, generator)
    return found


def trained_weights(model: nn.Module) -> int:
    """How many weights of a network want a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def set_scale(model: nn.Module, scale: float, name: str = "default") -> None:
    """Uses more or less of an adapter: 0 for none of it, 1 for what it was trained for; others may do, negative ones too.

    Raises:
        ValueError: there is no adapter of this name, says which there are; or they are merged.
    """
    for layer in _with_adapter(model, name).values():
        _refuse_merged(layer)
        layer.scale[name] = scale


def merge(model: nn.Module) -> None:
    """Adds every update to the weight beside which it sits, at its present scale: from then on the adapters cost nothing.

    The factors are kept, so that `unmerge` can take the update off again; outputs stay the same to float rounding.

    Raises:
        ValueError: there is no adapter, or they are merged already: a second time would add them twice.
    """
    layers = _adapted(model).values()
    _refuse_merged(*layers)
    for layer in layers:
        layer.base.weight.data += layer.update()
        layer.merged = True


def unmerge(model: nn.Module) -> None:
    """Takes off what `merge` added.  The weights return to within float rounding, not to the bit.

    Raises:
        ValueError: there is no adapter, or they are not merged.
    """
    for name, layer in _adapted(model).items():
        if not layer.merged:
            raise ValueError(f"the adapters of {name} are not merged, so there is nothing to take off; call merge first")
        layer.merged = False
        layer.base.weight.data -= layer.update()


def remove(model: nn.Module) -> None:
    """Puts the plain layers back: without the adapters; or, after `merge`, with them in the weights for good.

    Raises:
        ValueError: there is no adapter.
    """
    for name, layer in _adapted(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What there is to be stored of an adapter: `layer.down`, `layer.up` and `layer.alpha` for each layer; no scale.

    Raises:
        ValueError: there is no adapter of this name; says which there are.
    """
    state = {}
    for layer, lora in _with_adapter(model, name).items():
        state[f"{layer}.down"] = lora.down[name].weight.detach().clone()
        state[f"{layer}.up"] = lora.up[name].weight.detach().clone()
        state[f"{layer}.alpha"] = torch.tensor(lora.alpha[name])
    return state


def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> list[str]:
    """Gives a network an adapter that was trained before; as `inject` otherwise, and ready to be trained on.

    Args:
        model: changed in place.
        tensors: as from `adapter_state`; without an alpha the product of the factors is taken as it is.
        name: what to call it here.

    Returns:
        The names of the layers that have it now.

    Raises:
        ValueError: as `check_adapter`, and nothing has been changed.
    """
    ranks = check_adapter(model, tensors)
    _check_new(name, min(ranks.values()))
    model.requires_grad_(False)
    for layer, rank in ranks.items():
        lora = _wrap(model, layer)
        lora.add(name, rank, float(tensors.get(f"{layer}.alpha", rank)))
        for factor, module in (("down", lora.down[name]), ("up", lora.up[name])):
            module.weight.data.copy_(tensors[f"{layer}.{factor}"].reshape(module.weight.shape))
    return list(ranks)


def check_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Makes sure that an adapter fits a network; the layers it is for, and its rank in each.

    Raises:
        ValueError: the network lacks a layer, a factor is missing or of a wrong shape, or adapters are merged; says which.
    """
    layers, ranks = adaptable_layers(model), {}
    for layer in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        down, up = tensors.get(f"{layer}.down"), tensors.get(f"{layer}.up")
        if layer not in layers:
            raise ValueError(f"the adapter is for a layer {layer}, which this model does not have: it is for another model")
        if down is None or up is None:
            raise ValueError(f"the adapter has only one of two factors for {layer}: the file is damaged, fetch it again")
        _refuse_merged(layers[layer])
        ranks[layer], weight = len(down), layers[layer].weight
        found, wanted = (down.flatten(1).shape, up.flatten(1).shape), ((len(down), weight[0].numel()), (len(weight), len(down)))
        if found != wanted:  # a 1x1 convolution's factors fit a linear layer, and the other way round
            raise ValueError(
                f"the adapter's factors for {layer} are {tuple(down.shape)} and {tuple(up.shape)}, which make no "
                f"{tuple(weight.shape)}: it is for another model"
            )
    if not ranks:
        raise ValueError("the adapter is empty; expected down, up and alpha of at least one layer")
    return ranks


def _adapted(model: nn.Module) -> dict[str, LoRA]:
    """The layers that have adapters, by name."""
    found = {name: module for name, module in adaptable_layers(model).items() if isinstance(module, LoRA)}
    if not found:
        raise ValueError("the model has no adapters; inject or load one first")
    return found


def _with_adapter(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The layers that have the adapter of this name."""
    layers = _adapted(model)
    if not (found := {layer: lora for layer, lora in layers.items() if name in lora.down}):
        known = sorted({known for lora in layers.values() for known in lora.down})
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known)}")
    return found


def _wrap(model: nn.Module, name: str) -> LoRA:
    """The wrapper of a layer, put there if there is none."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    if not isinstance(getattr(parent, child), LoRA):
        setattr(parent, child, LoRA(getattr(parent, child)))
    return getattr(parent, child)


def _check_new(name: str, rank: int, *layers: nn.Module) -> None:
    if rank < 1 or "." in name or not name:
        raise ValueError(f"rank is {rank} and name {name!r}; expected a rank of 1 or more, and a name without dots")
    _refuse_merged(*layers)


def _refuse_merged(*layers: nn.Module) -> None:
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("the adapters are merged into the weights already; unmerge them first")
