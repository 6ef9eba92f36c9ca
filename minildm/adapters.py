"""What is published to go beside a model, not in it: ControlNets, read and written in the two layouts that are in use.

Of a ControlNet, a diffusers folder says in its settings what it looks like; a single file in the original layout has none, so
that it is read off the shapes of the weights, as in `compvis`.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from minildm.checkpoint import write_atomically
from minildm.compvis import infer_unet
from minildm.configs import read_unet, write_unet
from minildm.controlnet import ControlNet
from minildm.convert import open_folder, read_json
from minildm.files import Stored, open_weights
from minildm.layouts import DIFFUSERS_CONTROLNET, compvis_controlnet, names
from minildm.machine import best_device
from minildm.tensors import Fitting, check, fill, under, unify
from minildm.unet import UNet, UNetConfig

CONTROLNET = "ControlNetModel"  # the reference's class
PREFIX = "control_model."  # of its weights in a single file, which may hold the U-Net that it goes with, too

# Settings of a U-Net that a ControlNetModel has not: they belong to the way up, which it lacks, or have one value only.
NOT_OF_CONTROLNETS = {
    "sample_size", "out_channels", "up_block_types", "resnet_out_scale_factor", "time_embedding_type", "conv_in_kernel",
    "conv_out_kernel", "attention_type",
}  # fmt: skip


def read_controlnet(path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ControlNet:
    """Reads a ControlNet for Stable Diffusion 1 or 2 or SDXL, or one that `write_controlnet` wrote.

    Args:
        path: a folder in the diffusers layout, with a config.json of a ControlNetModel; or a single file in the original
            layout, with weights named control_model.…, or named so but for that prefix.
        device: where to put it; the best there is if None.
        dtype: its precision; float32 if None.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: a file is damaged or holds something else, a setting is one that ours cannot follow, or weights do not fit;
            says which.
    """
    path = Path(path)
    cfg, hint_channels, hint_widths, stored = (_read_folder if path.is_dir() else _read_file)(path)
    try:
        with torch.device("meta"):
            control = ControlNet(UNet(cfg), hint_widths, hint_channels)
    except Exception as error:  # numbers that make no network fail in any way
        raise ValueError(f"{path} describes no network that could be built ({error!r}); fetch it again") from error
    table = DIFFUSERS_CONTROLNET if path.is_dir() else _compvis_table(control)
    fitting = Fitting(control, stored, table)
    check(path, {"controlnet": fitting})
    fill(fitting, torch.device(device or best_device()), dtype or torch.float32)
    return control.eval()


def write_controlnet(path: str | Path, control: ControlNet) -> None:
    """Writes a ControlNet: to a file in the original layout if path ends in .safetensors, else to a diffusers folder.

    Raises:
        ValueError: the layout cannot hold it; says why, and nothing has been written then.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        file, prefix, table = path, PREFIX, _compvis_table(control)
    else:
        file, prefix, table = path / "diffusion_pytorch_model.safetensors", "", DIFFUSERS_CONTROLNET
    named = names(control.state_dict(), table)
    tensors = {prefix + named[ours]: tensor.contiguous() for ours, tensor in control.state_dict().items()}
    if path.suffix == ".safetensors":
        _check_shapes_tell_all(control, {n.removeprefix(PREFIX): Stored(tuple(t.shape), t.detach) for n, t in tensors.items()})
    else:
        fields = {name: value for name, value in write_unet(control.cfg, 64).items() if name not in NOT_OF_CONTROLNETS}
        fields |= {
            "_class_name": CONTROLNET, "conditioning_channels": control.hint_channels,
            "conditioning_embedding_out_channels": control.hint_widths, "controlnet_conditioning_channel_order": "rgb",
        }  # fmt: skip
        settings = json.dumps(fields, indent=2) + "\n"
        write_atomically(path / "config.json", lambda beside: beside.write_text(settings, encoding="utf-8"))
    write_atomically(file, lambda beside: save_file(tensors, beside, metadata={"format": "pt"}))


def _read_folder(folder: Path) -> tuple[UNetConfig, int, tuple[int, ...], dict[str, Stored]]:
    """The U-Net's configuration, the hint's channels, the hint encoder's widths, and the weights."""
    fields = read_json(folder / "config.json")
    if (kind := fields.pop("_class_name", None)) != CONTROLNET:
        raise ValueError(f"{folder} holds a {kind}; expected a {CONTROLNET}")
    order = fields.pop("controlnet_conditioning_channel_order", "rgb")
    if order != "rgb" or fields.pop("global_pool_conditions", False):
        raise ValueError(
            f"controlnet: {folder} wants its hint in the order {order}, or its residuals averaged over all positions; minildm "
            "can do neither: use the reference for it"
        )
    channels = fields.pop("conditioning_channels", 3)
    widths = fields.pop("conditioning_embedding_out_channels", (16, 32, 96, 256))
    try:
        up = [kind.replace("Down", "Up") for kind in reversed(fields["down_block_types"])]
        return read_unet(fields | {"up_block_types": up}), channels, tuple(widths), unify("controlnet", open_folder(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a settings file in {folder} is damaged ({error!r}); fetch it again") from error


def _read_file(path: Path) -> tuple[UNetConfig, int, tuple[int, ...], dict[str, Stored]]:
    """As `_read_folder`, from shapes alone."""
    content = open_weights(path)
    stored = unify("controlnet", under(PREFIX, content) or content)
    try:
        convs = _hint_convs(stored)
        return _infer(stored), convs[0][1], tuple(shape[0] for shape in convs[::2]), stored
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is no ControlNet in the original layout: it has no usable {error}, but {', '.join(sorted(content)[:3])}; "
            f"give a file with {PREFIX}… in it, or a folder in the diffusers layout"
        ) from error


def _infer(stored: dict[str, Stored]) -> UNetConfig:
    """The configuration of the U-Net that a ControlNet goes with; raises as `infer_unet`."""
    way_out = Stored(stored["input_blocks.0.0.weight"].shape[1:], torch.Tensor)  # it has none; as wide as the way in
    return infer_unet(stored | {"out.2.weight": way_out})


def _hint_convs(stored: dict[str, Stored]) -> list[tuple[int, ...]]:
    """Shapes of the hint encoder's convolutions but the last: 3 to w0, then w0 to w0 and w0 to w1, and so on."""
    numbers = sorted(int(n.split(".")[1]) for n in stored if n.startswith("input_hint_block.") and n.endswith(".weight"))
    return [stored[f"input_hint_block.{n}.weight"].shape for n in numbers[:-1]]


def _compvis_table(control: ControlNet) -> list:
    return compvis_controlnet(control.cfg.depths, control.cfg.blocks, len(control.hint.convs))


def _check_shapes_tell_all(control: ControlNet, stored: dict[str, Stored]) -> None:
    """Refuses what a single file, which has no settings, would be read back from as something else."""
    here = replace(control.cfg, out_channels=control.cfg.in_channels)
    try:
        there = _infer(stored)
    except (KeyError, ValueError):
        there = None
    if here != there:
        raise ValueError(
            f"a single file has no settings, and the shapes of its weights do not tell {here} from {there}; write a folder"
        )
