"""LoRA files in and out, in the two formats in use: kohya's, one file for all networks, and peft's, alone or inside diffusers.

Both hold two factors a layer and differ in the names.  No name is ever parsed: every spelling of every layer that the networks
have is written down first, and a file's names are looked up there.  So a file for another model is found out before anything
is changed.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minildm.checkpoint import write_atomically
from minildm.clip import TextEncoder
from minildm.files import open_weights
from minildm.layouts import DIFFUSERS_UNET, TRANSFORMERS_TEXT, Table, compvis_unet, rename
from minildm.lora import LoRA, adaptable_layers, adapter_state, check_adapter, load_adapter
from minildm.sdxl import SDXLText
from minildm.unet import UNet

Text = TextEncoder | SDXLText

FACTOR = re.compile(r"^(.+)\.(?:(lora_down|lora_A|lora\.down)|(lora_up|lora_B|lora\.up))\.weight$")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_1": "lora_te1_", "text_encoder_2": "lora_te2_"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # peft's own, and diffusers'


def read_lora(path: str | Path, unet: UNet, text: Text | None = None, name: str = "default") -> dict[str, list[str]]:
    """Gives networks the adapter in a file; all of it is checked before any of it is used.

    Args:
        path: a `.safetensors` of kohya's or of diffusers', or a folder that peft or diffusers wrote.
        unet: changed in place.
        text: likewise; None if the file has nothing for it.
        name: what to call the adapter here.

    Returns:
        The layers that have it now, by part: "unet", "text_encoder", "text_encoder_2".

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: it holds more than pairs of factors (DoRA, LoHa, LoKr), is for other layers, or does not fit; says what.
    """
    path = Path(path)
    if path.is_dir():
        there = [path / file for file in IN_FOLDERS if (path / file).is_file()]
        if not there:
            raise FileNotFoundError(f"no adapter in {path}: expected {' or '.join(IN_FOLDERS)}")
        path = there[0]
    networks, stored = _networks(unet, text), open_weights(path)
    known, states, strange = _spellings(networks), {part: {} for part in networks}, []
    for key, tensor in stored.items():
        factor = FACTOR.match(key)
        layer, kind = (factor[1], "down" if factor[2] else "up") if factor else (key.removesuffix(".alpha"), "alpha")
        if layer in known and (factor or key.endswith(".alpha")):
            part, ours = known[layer]
            states[part][f"{ours}.{kind}"] = tensor.read()
        else:
            strange.append(key)
    if strange or not stored:
        without = "" if text else "; for what it says of the text encoder, give text"
        raise ValueError(
            f"{len(strange)} of {len(stored)} tensors in {path} are no factor of a layer of this model, {strange[:3]} first: "
            f"it is for another model, or no plain LoRA{without}"
        )
    states = {part: state for part, state in states.items() if state}
    for part, state in states.items():
        _check_numbers(path, state)
        check_adapter(networks[part], state)
    try:
        settings = _settings(path)
        for part, state in states.items():
            _add_alphas(state, settings.get(part, {}), _table(part))
            _check_numbers(path, state)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise ValueError(f"the settings of {path} are damaged ({error}); fetch it again, or take them away") from error
    return {part: load_adapter(networks[part], state, name) for part, state in states.items()}


def write_lora(path: str | Path, unet: UNet, text: Text | None = None, name: str = "default", layout: str = "kohya") -> None:
    """Writes an adapter of one or more networks.

    Args:
        path: the file; for the layout "peft", the folder.
        unet: its factors are written, if it has the adapter; not its own weights, nor the scale at which it is used.
        text: likewise; None for none.
        name: of the adapter.
        layout: "kohya", which most programs read; "diffusers", one file with peft's names and no alpha, which is multiplied
            into the factors; "peft", a folder with the U-Net's adapter and its settings.

    Raises:
        ValueError: no network has the adapter, another layout, or a text encoder's adapter in peft's.
        OSError: the file cannot be written.
    """
    if layout not in ("kohya", "diffusers", "peft"):
        raise ValueError(f'layout is {layout!r}; choose "kohya", "diffusers" or "peft"')
    networks = _networks(unet, text)
    having = {part: network for part, network in networks.items() if _has(network, name)} or {"unet": unet}
    states = {part: adapter_state(network, name) for part, network in having.items()}
    if layout == "peft" and [*states] != ["unet"]:
        raise ValueError("peft writes a folder for each network, and minildm the U-Net's alone: choose another layout for both")

    path, tensors, notes = Path(path), {}, {"format": "pt"}
    for part, state in states.items():
        for layer in dict.fromkeys(key.rpartition(".")[0] for key in state):
            down, up, alpha = (state[f"{layer}.{kind}"].contiguous() for kind in ("down", "up", "alpha"))
            theirs = _spell(layer, _table(part))
            if layout == "kohya":
                one_of_two = part == "text_encoder" and "text_encoder_2" in networks
                stem = KOHYA["text_encoder_1" if one_of_two else part] + theirs.replace(".", "_")
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha.to(down)}
            else:
                stem = f"base_model.model.{theirs}" if layout == "peft" else f"{part}.{theirs}"
                up = up if layout == "peft" else up * (alpha.item() / len(down))
                tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    file = path / IN_FOLDERS[0] if layout == "peft" else path
    write_atomically(file, lambda beside: save_file(tensors, beside, metadata=notes))
    if layout == "peft":
        settings = json.dumps(_peft_settings(states["unet"]), indent=2)
        write_atomically(path / "adapter_config.json", lambda beside: beside.write_text(settings + "\n"))


def _networks(unet: UNet, text: Text | None) -> dict[str, nn.Module]:
    """The networks by the names of diffusers' parts."""
    if isinstance(text, SDXLText):
        return {"unet": unet, "text_encoder": text.small, "text_encoder_2": text.large}
    return {"unet": unet} | ({"text_encoder": text} if text else {})


def _has(network: nn.Module, name: str) -> bool:
    return any(isinstance(module, LoRA) and name in module.down for module in network.modules())


def _table(part: str) -> Table:
    return DIFFUSERS_UNET if part == "unet" else TRANSFORMERS_TEXT


def _spell(layer: str, table: Table) -> str:
    """What a layout calls a layer; its tables are for weights."""
    return rename(f"{layer}.weight", table).removesuffix(".weight")


def _spellings(networks: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Everything that a file may call the layers of these networks: to the network and our name."""
    known = {}
    for part, network in networks.items():
        for layer in adaptable_layers(network):
            theirs = _spell(layer, _table(part))
            dotted = [f"{part}.{theirs}"]
            flat = [theirs]
            if part == "unet":  # peft's folder names no part; kohya's files for SDXL have the original names
                dotted += [theirs, f"base_model.model.{theirs}"]
                flat += [_spell(layer, compvis_unet(network.cfg.depths, network.cfg.blocks))]
            else:  # newer releases of transformers leave the prefix out
                dotted += [f"{part}.{theirs.removeprefix('text_model.')}"]
            prefixes = [KOHYA[part], KOHYA["text_encoder_1"]] if part == "text_encoder" else [KOHYA[part]]
            dotted += [prefix + stem.replace(".", "_") for prefix in prefixes for stem in flat]
            known |= dict.fromkeys(dotted, (part, layer))
    return known


def _check_numbers(path: Path, state: dict[str, Tensor]) -> None:
    """Makes sure that factors are matrices of fractions and alphas single numbers, before a network is changed.

    Raises:
        ValueError: something else is; says which.
    """
    for key, tensor in state.items():
        one, kind = key.endswith(".alpha"), tensor.dtype
        whole = not kind.is_floating_point and not kind.is_complex
        number = (kind in FLOATS or whole) and tensor.numel() == 1 and math.isfinite(tensor.item())
        if not (number if one else kind in FLOATS and tensor.ndim > 1 and tensor.numel()):
            wanted = "one finite number" if one else f"a factor of rank 1 or more in {', '.join(map(str, FLOATS))}"
            raise ValueError(f"{path}: {key} is {tuple(tensor.shape)} {kind}, expected {wanted}: it is damaged")


def _settings(path: Path) -> dict[str, dict]:
    """What peft's settings file beside, or a note in the header of diffusers' file, says of each part."""
    beside = path.with_name("adapter_config.json")
    if path.name == IN_FOLDERS[0] and beside.is_file():
        return {"unet": _object(beside.read_text(encoding="utf-8"))}
    result: dict[str, dict] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            note = _object((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        for key, value in note.items():
            part, _, field = key.partition(".")
            result.setdefault(part, {})[field] = value
    return result


def _object(text: str) -> dict:
    if not isinstance(fields := json.loads(text), dict):
        raise ValueError(f"they are a {type(fields).__name__}, not names with values")
    return fields


def _add_alphas(state: dict[str, Tensor], settings: dict, table: Table) -> None:
    """Gives the layers whose alpha is not in the file the one of its settings; without any the scale stays 1."""
    for key, down in [(key, down) for key, down in state.items() if key.endswith(".down")]:
        layer = key.removesuffix(".down")
        if f"{layer}.alpha" not in state and "lora_alpha" in settings:
            alpha, theirs = settings["lora_alpha"], _spell(layer, table)
            for pattern, other in (settings.get("alpha_pattern") or {}).items():
                if len(re.findall(r"[*+?{]", pattern)) > 2 or pattern.count("(") > 1 or re.search(r"\)[*+?{]", pattern):
                    raise ValueError(f"the pattern {pattern[:40]} might take for ever to match; expected a layer's name")
                alpha = other if re.match(rf"(.*\.)?({pattern})$", theirs) else alpha
            rooted = len(down) ** 0.5 if settings.get("use_rslora") else 1.0  # Kalajdzievski 2023 divides by the root
            state[f"{layer}.alpha"] = torch.tensor(alpha * rooted)


def _peft_settings(state: dict[str, Tensor]) -> dict:
    """peft's adapter_config.json: the commonest rank and alpha, and who differs."""
    ranks = {_spell(k.removesuffix(".down"), DIFFUSERS_UNET): len(t) for k, t in state.items() if k.endswith(".down")}
    alphas = {_spell(k.removesuffix(".alpha"), DIFFUSERS_UNET): t.item() for k, t in state.items() if k.endswith(".alpha")}
    rank, alpha = (max(sorted(set(v.values())), key=[*v.values()].count) for v in (ranks, alphas))
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "r": rank, "lora_alpha": alpha, "target_modules": [*ranks],
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
    }  # fmt: skip
