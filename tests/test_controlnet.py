"""ControlNet: silent at the start, the reference's in every number afterwards, and told apart from what it is not."""

import json
from copy import deepcopy

import pytest
import reference
import torch
from reference import diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minildm import configs, layouts
from minildm.adapters import read_controlnet, write_controlnet
from minildm.controlnet import ControlNet, HintEncoder, controlled, zero_conv
from minildm.guidance import guided
from minildm.unet import UNet, UNetConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TINY = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=12, pooled_dim=6, groups=4)
HINT = (4, 8, 12)  # widths of a hint encoder that shrinks by 4


def inputs(b: int = 2) -> dict[str, Tensor]:
    return {
        "x": torch.randn(b, 4, 8, 12),
        "t": torch.arange(b) * 400,
        "context": torch.randn(b, 5, 12),
        "hint": torch.rand(b, 3, 32, 48),
        "pooled": torch.randn(b, 6),
    }


def without_hint(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in given.items() if name != "hint"}


def a_pair(cfg: UNetConfig = TINY, hint_widths: tuple[int, ...] = HINT) -> tuple[UNet, ControlNet]:
    """A U-Net with random weights, and its ControlNet before any training."""
    unet = reference.randomise(UNet(cfg), seed=1)
    return unet, ControlNet(unet, hint_widths).eval()


# ------------------------------------------------------------------------------------------------------------ the beginning


def test_before_training_nothing_changes_to_the_bit():
    unet, control = a_pair()
    given = inputs()
    assert all(not residual.any() for residual in control(**given))
    with torch.no_grad():
        assert torch.equal(controlled(unet, control)(**given), unet(**without_hint(given)))
        louder = controlled(unet, control, scale=1e6)
        assert torch.equal(louder(**given), unet(**without_hint(given)))


def test_both_kinds_of_zero_convolution_are_there_and_learn():
    """First the ones on the way out; the one on the way in hears nothing until they have left zero."""
    unet, control = a_pair()
    unet.requires_grad_(False)
    given = inputs()
    zeros = [*control.zeros, control.zero_mid]
    assert all(not p.any() for conv in [*zeros, control.hint.out] for p in conv.parameters())
    controlled(unet, control)(**given).square().mean().backward()
    assert all(conv.weight.grad.any() and conv.bias.grad.any() for conv in zeros)
    others = [p for name, p in control.named_parameters() if not name.startswith("zero")]
    assert not any(p.grad.any() for p in others)  # nothing gets through zeros

    with torch.no_grad():
        for conv in zeros:
            conv.weight -= conv.weight.grad
    control.zero_grad()
    controlled(unet, control)(**given).square().mean().backward()
    assert control.hint.out.weight.grad.any()
    assert control.down[0].res[0].conv1.weight.grad.any()
    assert not control.hint.convs[0].weight.grad.any()  # the zeros after it are still in the way


def test_the_copy_shares_nothing_and_trains_where_the_unet_is_frozen():
    unet = reference.randomise(UNet(TINY)).requires_grad_(False)
    before = deepcopy(unet.state_dict())
    control = ControlNet(unet, HINT)
    assert all(p.requires_grad for p in control.parameters())
    assert not any(p.requires_grad for p in unet.parameters())
    for name, p in control.named_parameters():
        if name in before:
            assert torch.equal(p, before[name])
        with torch.no_grad():
            p.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_it_hears_everything_it_is_given_the_noisy_latents_too():
    _, control = a_pair()
    reference.randomise(control)
    given = inputs()
    plain = control(**given)
    for name in given:
        changed = control(**given | {name: given[name] * 0.5 + (1 if name == "t" else 0)})
        assert not torch.allclose(plain[-1], changed[-1]), f"deaf to {name}"


def test_scale_multiplies_what_it_says():
    unet, control = a_pair()
    reference.randomise(control)
    given = inputs()
    with torch.no_grad():
        for half, whole in zip(control(**given, scale=0.5), control(**given), strict=True):
            torch.testing.assert_close(half, 0.5 * whole)
        assert torch.equal(controlled(unet, control, scale=0)(**given), unet(**without_hint(given)))
        assert not torch.allclose(controlled(unet, control)(**given), unet(**without_hint(given)))


def test_a_unet_with_a_patchify_stem_has_one_too():
    cfg = UNetConfig(**{**TINY.__dict__, "patch": 2})
    unet, control = a_pair(cfg, hint_widths=(4, 8, 8, 12))  # 4 pixels to a latent, 2 latents to a patch
    given = inputs()
    with torch.no_grad():
        assert torch.equal(controlled(unet, control)(**given), unet(**without_hint(given)))
        reference.randomise(control)
        shapes = [tuple(r.shape[1:]) for r in control(**given)]
    assert shapes == [(8, 4, 6), (8, 4, 6), (8, 2, 3), (16, 2, 3), (16, 2, 3)]


def test_guidance_takes_it_as_a_model():
    unet, control = a_pair()
    reference.randomise(control)
    given, model = inputs(), controlled(unet, control)
    x, t, hint = given["x"], given["t"], given["hint"]
    cond = {name: given[name] for name in ("context", "pooled", "hint")}
    uncond = {"context": torch.randn(1, 5, 12), "pooled": torch.randn(1, 6), "hint": hint}
    with torch.no_grad():
        wanted = model(x, t, **cond)
        torch.testing.assert_close(guided(model, cond, uncond, scale=1)(x, t), wanted)
        both = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in uncond.items()}
        torch.testing.assert_close(guided(model, cond, uncond, scale=0)(x, t), model(x, t, **both), **CLOSE)


# -------------------------------------------------------------------------------------------------------------- full size


def test_of_stable_diffusion_it_has_the_published_size():
    with torch.device("meta"):
        control = ControlNet(UNet(UNetConfig.sd15()))
        residuals = control(
            torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768), hint=torch.empty(2, 3, 512, 512)
        )
    assert sum(p.numel() for p in control.parameters()) == 361_279_120
    assert len(control.state_dict()) == 340
    shapes = [(320, 64)] * 3 + [(320, 32)] + [(640, 32)] * 2 + [(640, 16)] + [(1280, 16)] * 2 + [(1280, 8)] * 4
    assert [tuple(r.shape) for r in residuals] == [(2, width, side, side) for width, side in shapes]


# ----------------------------------------------------------------------------------------------------------- the reference


def the_references(kind: str, **changes: object) -> tuple[nn.Module, nn.Module]:
    """A small U-Net of the reference and a ControlNet made for it, both with random weights, zero convolutions too."""
    unet = reference.unet(kind)
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT, **changes)
    return unet, reference.randomise(control, seed=5)


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def published(request, tmp_path_factory):
    """The reference's U-Net and ControlNet, and the folder that it wrote the second to."""
    folder = tmp_path_factory.mktemp(request.param)
    unet, control = the_references(request.param)
    control.save_pretrained(folder)
    return unet, control, folder


def given_to_both(unet: nn.Module) -> tuple[tuple, Tensor, Tensor | None, dict | None]:
    """(x, t, context), hint, and the pooled vector as ours takes it and as the reference does."""
    told = torch.randn(2, 4, 8, 12), torch.tensor([7, 981]), torch.randn(2, 5, unet.config.cross_attention_dim)
    hint, pooled, added = torch.rand(2, 3, 32, 48), None, None
    if unet.config.addition_embed_type:
        text, numbers = torch.randn(2, 128), torch.randint(0, 1024, (2, 6))
        added = {"text_embeds": text, "time_ids": numbers}
        pooled = torch.cat([text, unet.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=1)
    return told, hint, pooled, added


@torch.no_grad()
def test_it_is_the_references_and_so_is_what_the_unet_makes_of_it(published):
    theirs, their_control, folder = published
    ours = read_controlnet(folder, device="cpu")
    unet = UNet(configs.read_unet(dict(theirs.config))).eval()
    named = layouts.names(unet.state_dict(), layouts.DIFFUSERS_UNET)
    unet.load_state_dict({name: theirs.state_dict()[there] for name, there in named.items()})
    told, hint, pooled, added = given_to_both(theirs)

    down, mid = their_control(*told, hint, conditioning_scale=0.7, added_cond_kwargs=added, return_dict=False)
    given = ours(*told, hint, pooled, scale=0.7)
    assert len(given) == len(down) + 1
    for residual, wanted in zip(given, [*down, mid], strict=True):
        assert wanted.std() > 0.1  # something to compare
        torch.testing.assert_close(residual, wanted, **CLOSE)
    extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    wanted = theirs(*told, added_cond_kwargs=added, **extra).sample
    assert (wanted - theirs(*told, added_cond_kwargs=added).sample).std() > 0.05
    torch.testing.assert_close(controlled(unet, ours, scale=0.7)(*told, hint, pooled), wanted, **CLOSE)


@torch.no_grad()
def test_what_we_write_is_what_the_reference_wrote_and_opens_there(published, tmp_path):
    theirs, their_control, folder = published
    ours = read_controlnet(folder, device="cpu")
    write_controlnet(tmp_path, ours)
    given, wanted = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in given)
    again, info = diffusers.ControlNetModel.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not any(info.values())
    with torch.device("meta"):
        known = dict(diffusers.ControlNetModel().config)
    assert json.loads((tmp_path / "config.json").read_text()).keys() - {"_class_name"} <= known.keys()
    told, hint, _, added = given_to_both(theirs)
    for a, b in zip(
        *(c(*told, hint, added_cond_kwargs=added, return_dict=False)[0] for c in (again, their_control)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def original_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's weights under the original names."""
    renamed = reference.compvis_unet({name: t for name, t in state.items() if not name.startswith("controlnet_")})
    for name, tensor in state.items():
        stem, end = name.rsplit(".", 1)
        n = int(number) if (number := stem.rsplit(".", 1)[-1]).isdigit() else None
        if stem.startswith("controlnet_cond_embedding"):
            last = 2 + 2 * sum(".blocks." in other and other.endswith("weight") for other in state)
            stem = f"input_hint_block.{0 if stem.endswith('conv_in') else last if n is None else 2 * n + 2}"
        elif stem.startswith("controlnet_"):
            stem = "middle_block_out.0" if n is None else f"zero_convs.{n}.0"
        else:
            continue
        renamed[f"{stem}.{end}"] = tensor
    return renamed


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_single_file_holds_the_same_as_the_folder(published, tmp_path, prefix):
    _, their_control, folder = published
    content = {prefix + name: t.clone() for name, t in original_layout(their_control.state_dict()).items()}
    if prefix:  # the first ones came in one file with the model
        content |= {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "betas": torch.zeros(1000)}
    save_file(content, tmp_path / "control.safetensors")
    one, other = read_controlnet(tmp_path / "control.safetensors", device="cpu"), read_controlnet(folder, device="cpu")
    assert (one.cfg, one.hint_widths, one.hint_channels) == (other.cfg, other.hint_widths, other.hint_channels)
    assert same_weights(one, other)

    write_controlnet(tmp_path / "ours.safetensors", other)
    written = load_file(tmp_path / "ours.safetensors")
    wanted = {f"control_model.{name}": t for name, t in original_layout(their_control.state_dict()).items()}
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in written)


def test_the_published_size_has_its_published_names_in_both_layouts():
    with torch.device("meta"):
        ours = ControlNet(UNet(UNetConfig.sd15())).state_dict()
        theirs = diffusers.ControlNetModel(cross_attention_dim=768).state_dict()
    named = layouts.names(ours, layouts.DIFFUSERS_CONTROLNET)
    assert {there: tuple(ours[here].shape) for here, there in named.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    single = set(layouts.names(ours, layouts.compvis_controlnet((1, 1, 1, 0), blocks=2, hint_convs=7)).values())
    assert single == set(original_layout(theirs))
    assert {
        "input_hint_block.0.weight",
        "input_hint_block.14.bias",
        "zero_convs.11.0.weight",
        "middle_block_out.0.bias",
    } <= single


def test_our_own_go_to_a_folder_and_back(tmp_path):
    _, control = a_pair()
    reference.randomise(control)
    write_controlnet(tmp_path, control)
    back = read_controlnet(tmp_path, device="cpu", dtype=torch.float16)
    assert back.conv_in.weight.dtype == torch.float16
    back = read_controlnet(tmp_path, device="cpu")
    assert (back.cfg, back.hint_widths) == (control.cfg, HINT)
    assert same_weights(back, control)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (torch.rand(2, 3, 32, 32), r"hint is \(2, 3, 32, 32\); expected \(2, 3, 32, 48\): pixels, 4 to a side"),
        (torch.rand(1, 3, 32, 48), r"expected \(2, 3, 32, 48\)"),
        (torch.rand(2, 1, 32, 48), r"expected \(2, 3, 32, 48\)"),
        (torch.rand(2, 3, 32, 48) * 255, r"ranges from .* expected \[0, 1\]: divide bytes by 255"),
        (torch.rand(2, 3, 32, 48) * 2 - 1, r"expected \[0, 1\]"),
        (torch.full((2, 3, 32, 48), float("nan")), r"ranges from nan"),
    ],
)
def test_a_hint_that_does_not_fit_is_named(hint, message):
    with pytest.raises(ValueError, match=message):
        controlled(*a_pair())(**inputs() | {"hint": hint})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 8, 12), r"expected \(B, 4, H, W\)"),
        ("context", torch.zeros(2, 5, 13), r"expected \(2, L, 12\)"),
        ("pooled", None, r"pooled is None; expected \(2, 6\)"),
    ],
)
def test_what_the_unet_refuses_its_copy_refuses(name, value, message):
    _, control = a_pair()
    with pytest.raises(ValueError, match=message):
        control(**inputs() | {name: value})


def test_files_that_are_no_controlnet_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.safetensors"):
        read_controlnet(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        read_controlnet(tmp_path)
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no ControlNet in the original layout.*control_model"):
        read_controlnet(tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel; expected a ControlNetModel"):
        read_controlnet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(ValueError, match=r"is damaged .*down_block_types"):
        read_controlnet(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("controlnet_conditioning_channel_order", "bgr", "the order bgr"),
        ("global_pool_conditions", True, "averaged over all positions"),
        ("mid_block_type", "UNetMidBlock2D", "mid_block_type is 'UNetMidBlock2D'"),
    ],
)
def test_settings_that_ours_cannot_follow_are_refused(published, tmp_path, field, value, message):
    fields = json.loads((published[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match=message):
        read_controlnet(tmp_path)


def test_weights_that_do_not_fit_are_named(published, tmp_path):
    folder = published[2]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["extra"] = weights.pop("controlnet_mid_block.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    message = r"controlnet: 1 missing \(controlnet_mid_block\.bias\), 1 unexpected \(extra\)"
    with pytest.raises(ValueError, match=message):
        read_controlnet(tmp_path)


def test_what_a_layout_cannot_hold_is_not_written(tmp_path):
    _, control = a_pair()  # 2 heads, 4 groups, 1 block: no shape tells
    with pytest.raises(ValueError, match=r"a single file has no settings.*write a folder"):
        write_controlnet(tmp_path / "control.safetensors", control)
    patched = UNetConfig(**{**TINY.__dict__, "patch": 2})
    with pytest.raises(ValueError, match=r"cannot hold unet\.patch = 2"):
        write_controlnet(tmp_path / "folder", ControlNet(UNet(patched), HINT))
    assert list(tmp_path.rglob("*.*")) == []


def test_the_parts_alone():
    conv = zero_conv(3, 5, kernel_size=3)
    assert not conv(torch.randn(1, 3, 4, 6)).any()
    assert conv(torch.randn(1, 3, 4, 6)).shape == (1, 5, 4, 6)
    assert zero_conv(3, 5).kernel_size == (1, 1)
    encoder = HintEncoder(1, (4, 8), 6)
    assert not encoder(torch.rand(2, 1, 8, 12)).any()
    assert encoder(torch.rand(2, 1, 8, 12)).shape == (2, 6, 4, 6)
    assert [c.stride for c in encoder.convs] == [(1, 1), (1, 1), (2, 2)]
