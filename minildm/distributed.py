"""Several processes that train one model: each computes the gradient of its share of a batch, and all take the same step.

`torchrun` starts the processes and tells each its number; `minildm.loop.fit` does the rest.  A batch is drawn whole, from the
step's own generator, in every process, and then shared out, so that a run does not depend on how many processes made it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minildm.machine import best_device


@dataclass(frozen=True)
class World:
    """How many processes there are, and which of them this one is.  By default it is alone.

    Raises:
        ValueError: rank is not in [0, size).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank} of {self.size}; expected 0 to {self.size - 1}")

    def share(self, tensor: Tensor) -> Tensor:
        """This process's part of a whole batch, (B, ...) to (B / size, ...): the rank-th of `size` equal parts.

        Raises:
            ValueError: the batch cannot be cut into equal parts.
        """
        if len(tensor) % self.size:
            raise ValueError(
                f"a batch of {len(tensor)} cannot be shared equally among {self.size}; choose a multiple of {self.size}"
            )
        return tensor.chunk(self.size)[self.rank]

    def part(self, index: int, count: int) -> "World":
        """The index-th of `count` parts of this process's share, as if as many processes more had each taken one."""
        return World(self.rank * count + index, self.size * count, self.device)

    def mean(self, value: Tensor) -> float:
        """The mean of a number that each process has found for its share; all get it, all must ask."""
        if self.size > 1:
            value = value.detach().clone()  # not averaged by the backend: gloo can only sum
            dist.all_reduce(value)
            value /= self.size
        return value.item()

    def gather(self, tensor: Tensor) -> Tensor:
        """What all processes have, end to end in their order, (n, ...) and (m, ...) to (n + m, ...); all get it, all must ask.

        Its gradient is the sum of what all processes want of it.  A loss that each of them computes of the whole is so counted
        `size` times, and once in the mean that `parallel` takes.  OpenCLIP calls it gather_with_grad.
        """
        return tensor if self.size == 1 else _Gather.apply(tensor.to(self.device), self).to(tensor.device)

    def gather_texts(self, texts: list[str]) -> list[str]:
        """The same of texts, which travel as lines of JSON and not as a pickle."""
        if self.size == 1:
            return texts
        lines = "".join(f"{json.dumps(text)}\n" for text in texts).encode()
        everyone = self.gather(torch.tensor(list(lines), dtype=torch.uint8))
        return [json.loads(line) for line in bytes(everyone.tolist()).splitlines()]

    def agree(self, value: int, what: str) -> None:
        """Makes sure that all processes have the same number.

        Args:
            value: this process's.
            what: what the number is, for the error.

        Raises:
            ValueError: they have not; in every process.
        """
        if self.size > 1:
            ends = torch.tensor([value, -value], device=self.device)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            most, least = ends[0].item(), -ends[1].item()
            if most != least:
                raise ValueError(f"{what} differs from process to process, {least} to {most}: they must see the same folder")


class _Gather(torch.autograd.Function):
    """`World.gather`: pieces are padded to the longest, since they must be alike to travel."""

    @staticmethod
    def forward(ctx, tensor: Tensor, world: World) -> Tensor:
        own = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(lengths, own)
        lengths = torch.cat(lengths).tolist()
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        pieces = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(pieces, padded)
        ctx.start, ctx.length = sum(lengths[: world.rank]), len(tensor)
        return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.narrow(0, ctx.start, ctx.length), None


def join() -> World:
    """Meets the other processes that torchrun has started, through NCCL on GPUs and gloo on CPUs.

    So they do when `torchrun --max-restarts` starts them again after one has died, on one machine.  On several, the count of
    starts is not common to all: there, give torchrun TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, for a new store each time.

    Returns:
        This process's place among them; alone, `World()` on the best device, where torchrun has started no others.

    Raises:
        ValueError: the environment holds some of torchrun's variables, but not all of them.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given and len(given) < len(names):
        raise ValueError(f"the environment has {', '.join(given)} of {', '.join(names)}; start with torchrun, or unset them")
    size, rank, local = (int(given.get(name, default)) for name, default in zip(names, (1, 0, 0), strict=True))
    if size == 1:
        return World(device=best_device())
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # torchrun keeps its store when it starts all again: old addresses
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, device)


def leave() -> None:
    """Parts from the other processes; nothing where there were none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def parallel(model: nn.Module, world: World, how: str = "ddp") -> nn.Module:
    """Makes a model's gradient the mean over all processes.  To be called where the optimizer is not yet made.

    All processes begin with the weights of process 0, whatever they had.

    Args:
        model: on this process's device.
        world: alone, nothing is done.
        how: "ddp", every process holds all of the model (Li et al. 2020), or "fsdp", each holds a part of every tensor and
            fetches the others' while a block is computed (FSDP2, Zhao et al. 2023; ZeRO's stage 3, Rajbhandari et al. 2020).

    Returns:
        What to call in the model's place: a wrapper round it, or for "fsdp" and alone the model itself.

    Raises:
        ValueError: how is neither.
    """
    if how not in ("ddp", "fsdp"):
        raise ValueError(f'how is {how!r}; expected "ddp" or "fsdp"')
    if world.size == 1:
        return model
    if how == "ddp":
        ids = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh  # here, because they are slow to import
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # it shares out no others
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    model.register_forward_hook(lambda *call: call[2].clone() if isinstance(call[2], Tensor) else call[2])  # not a view
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*_blocks(model), model]:
        fully_shard(module, mesh=mesh)
    return model


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrapper that `parallel` may have put round it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def without_exchange(model: nn.Module, yes: bool = True) -> Iterator[None]:
    """While it lasts, processes do not exchange gradients, which add up in each: for all parts of a batch but the last.

    Args:
        model: from `parallel`, or any other, to which nothing is done.
        yes: False for no difference.
    """
    if yes and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif yes and hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Shortens the gradient of all parameters together to `max_norm`; returns how long it was."""
    return whole({"": nn.utils.clip_grad_norm_(parameters, max_norm)})[""].item()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for what may be spread over the processes; all get them, and all must ask."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def whole_run(
    model: nn.Module, average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, world: World
) -> tuple[SimpleNamespace, dict[str, Tensor], SimpleNamespace]:
    """A run that may be spread over the processes, as `save_checkpoint` takes it: whole in the first of them.

    All must ask.  Tensors are put together one after the other and taken off the device, so that a device needs room for the
    largest, and the memory of the first process for all: 16 bytes a weight, 14 GB for Stable Diffusion 1.5 and 41 GB for
    SDXL.  In return a checkpoint is one file with one writer, which any number of processes takes up.  A model too large for
    that needs torch.distributed.checkpoint, where each process writes its pieces, and whose index is a pickle.
    """

    def take(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taken = {}
        for name, tensor in tensors.items():
            tensor = whole({name: tensor})[name]
            if world.rank == 0:
                taken[name] = tensor.detach().cpu()
        return taken

    tensors, parameters = take(model.state_dict()), [p for group in optimizer.param_groups for p in group["params"]]
    states = {name: take(optimizer.state.get(p, {})) for name, p in zip(average, parameters, strict=True)}
    optimizer = SimpleNamespace(param_groups=[{"params": list(average)}], state=states)
    return SimpleNamespace(state_dict=lambda: tensors), take(average), optimizer


@contextmanager
def whole_is_welcome(world: World) -> Iterator[None]:
    """While it lasts, a whole tensor may be copied into one that is spread over the processes: each takes its part."""
    if world.size == 1:
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield


def recompute(model: nn.Module) -> nn.Module:
    """Keeps of every block only what goes into it; the rest is computed a second time on the way back.  Chen et al. 2016.

    Args:
        model: changed in place, and returned; gradients stay as they were.  To be called before `parallel`.
    """
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a model that are called and have parts of their own."""
    for child in model.children():
        if type(child).forward is not nn.Module.forward and next(child.children(), None) is not None:
            yield child
        else:
            yield from _blocks(child)
