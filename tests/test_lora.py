"""LoRA: nothing at the start, the same merged and unmerged, and the same as peft and diffusers from the files of either."""

import json

import peft
import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minildm
from minildm.blocks import ResBlock
from minildm.clip import TextConfig
from minildm.convert import read_diffusers
from minildm.layouts import DIFFUSERS_UNET, TRANSFORMERS_TEXT, compvis_unet, rename
from minildm.lora import (
    LoRA,
    adaptable_layers,
    adapter_state,
    check_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    set_scale,
    trained_weights,
    unmerge,
)
from minildm.lora_files import read_lora, write_lora
from minildm.sdxl import SDXLText, SDXLTextConfig
from minildm.train import Fit, fit
from minildm.unet import UNet, UNetConfig

ATTENTION = ("to_q", "to_k", "to_v", "to_out")
EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "ff.proj", "ff.out", "conv1", "conv2", "resample.conv", "time", "conv_in")
TINY = UNetConfig(widths=(16, 32), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=24, pooled_dim=20, groups=8)
# What tests write into factors: large enough to show, small enough that nothing overflows.
SIZE = 0.1


def network(cfg: UNetConfig = TINY) -> UNet:
    return reference.randomise(UNet(cfg), seed=5)


def inputs(cfg: UNetConfig = TINY, batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    given = {"x": torch.randn(batch, 4, 8, 8, generator=g), "t": torch.tensor([3, 700][:batch])}
    given["context"] = torch.randn(batch, 5, cfg.context_dim, generator=g)
    return given | ({"pooled": torch.randn(batch, cfg.pooled_dim, generator=g)} if cfg.pooled_dim else {})


@torch.no_grad()
def run(unet: UNet) -> Tensor:
    return unet(**inputs(unet.cfg))


def fill(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Random factors, as after a training."""
    g = torch.Generator().manual_seed(seed)
    for lora in (module for module in model.modules() if isinstance(module, LoRA) and name in module.down):
        for factor in (lora.down[name], lora.up[name]):
            factor.weight.data = SIZE * torch.randn(factor.weight.shape, generator=g)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- what it does


def test_it_changes_nothing_at_the_start_and_trains_nothing_else():
    unet = network()
    before, total = run(unet), sum(p.numel() for p in unet.parameters())
    layers = inject(unet, rank=2, alpha=4, targets=EVERYWHERE)
    assert torch.equal(run(unet), before)
    assert len(layers) == len(set(layers)) > 40
    assert trained_weights(unet) == sum(p.numel() for n, p in unet.named_parameters() if ".down." in n or ".up." in n)
    assert sum(p.numel() for p in unet.parameters()) == total + trained_weights(unet)
    assert unet.conv_in.weight.shape == (16, 4, 3, 3)


def test_training_moves_the_factors_and_no_weight():
    unet = network()
    before = run(unet)
    inject(unet, rank=2, alpha=2, targets=ATTENTION)
    old = weights(unet)
    losses = [
        p.loss for p in fit(unet, lambda step: (unet(**inputs()).square().mean(), {}), Fit(steps=8, lr=1e-2, warmup=1, ema=0.0))
    ]
    moved = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, old[name])}
    assert losses[-1] < losses[0]
    assert moved == {name for name in old if ".down." in name or ".up." in name}
    assert (run(unet) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 10),
        nn.Conv2d(6, 10, 1),
        nn.Conv2d(6, 10, 3, padding=1),
        nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=2, padding_mode="circular", bias=False),
    ],
    ids=["linear", "1x1", "3x3", "odd"],
)
def test_the_update_is_the_product_of_the_factors(layer):
    lora = LoRA(layer)
    lora.add("a", rank=3, alpha=6.0)
    fill(lora, "a")
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    product = torch.einsum("or,r...->o...", lora.up["a"].weight.flatten(1), lora.down["a"].weight)
    assert lora.update().shape == layer.weight.shape
    torch.testing.assert_close(lora.update(), 2.0 * product)
    unchanged = layer(x)
    together = lora(x)
    layer.weight.data += 2.0 * product
    torch.testing.assert_close(together, layer(x))
    assert (together - unchanged).abs().max() > 0.1


def test_merged_is_unmerged_and_back_again():
    unet = network()
    plain, old = run(unet), weights(unet)
    inject(unet, rank=3, alpha=6, targets=EVERYWHERE)
    fill(unet)
    set_scale(unet, 0.7)
    beside = run(unet)
    merge(unet)
    torch.testing.assert_close(run(unet), beside, rtol=1e-4, atol=1e-4)
    assert (beside - plain).abs().max() > 0.1
    unmerge(unet)
    torch.testing.assert_close(run(unet), beside)
    remove(unet)
    assert unet.state_dict().keys() == old.keys()
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, old[name], rtol=1e-6, atol=1e-6)


def test_remove_forgets_or_keeps_for_good():
    unet = network()
    plain, old = run(unet), weights(unet)
    inject(unet, rank=2, alpha=2, targets=ATTENTION)
    fill(unet)
    beside = run(unet)
    merge(unet)
    remove(unet)
    torch.testing.assert_close(run(unet), beside, rtol=1e-4, atol=1e-4)
    assert weights(unet).keys() == old.keys()
    unet.load_state_dict(old)
    inject(unet, rank=2, alpha=2, targets=ATTENTION)
    fill(unet)
    remove(unet)
    assert torch.equal(run(unet), plain)


def test_several_adapters_add_up_each_at_its_scale():
    unet = network()
    plain = run(unet)
    inject(unet, rank=2, alpha=2, targets=("attn2.to_v",), name="one")
    inject(unet, rank=1, alpha=5, targets=("attn2.to_v", "conv1"), name="two")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, p in unet.named_parameters() if p.requires_grad} == {"two"}
    fill(unet, "one", seed=1)
    fill(unet, "two", seed=2)
    updates = {}
    for one, two in ((1, 0), (0, 1), (0.5, -2)):
        set_scale(unet, one, "one")
        set_scale(unet, two, "two")
        updates[one, two] = {name: m.update() for name, m in unet.named_modules() if isinstance(m, LoRA)}
    for name, both in updates[0.5, -2].items():
        torch.testing.assert_close(both, 0.5 * updates[1, 0][name] - 2 * updates[0, 1][name])
    set_scale(unet, 0, "one")
    set_scale(unet, 0, "two")
    torch.testing.assert_close(run(unet), plain)


def test_the_scale_is_alpha_over_rank():
    answers = []
    for rank, alpha in ((1, 1.0), (1, 4.0), (4, 4.0)):
        lora = LoRA(nn.Linear(8, 8, bias=False))
        nn.init.zeros_(lora.base.weight)
        lora.add("default", rank, alpha)
        lora.down["default"].weight.data.fill_(1.0)
        lora.up["default"].weight.data.fill_(1.0)
        answers.append(lora(torch.ones(1, 8))[0, 0].item())
    assert answers == [8, 32, 32]


def test_an_adapter_goes_into_another_copy():
    first, second = network(), network()
    inject(first, rank=2, alpha=3, targets=EVERYWHERE)
    fill(first)
    state = adapter_state(first)
    assert set(load_adapter(second, state, "mine")) == {key.rpartition(".")[0] for key in state}
    assert torch.equal(run(first), run(second))
    assert trained_weights(second) == trained_weights(first)
    again = adapter_state(second, "mine")
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    assert check_adapter(first, state) == dict.fromkeys(load_adapter(second, state, "mine"), 2)


def test_a_seed_says_what_a_starts_as():
    states = []
    for _ in range(2):
        unet = network()
        inject(unet, rank=2, alpha=2, targets=ATTENTION, generator=torch.Generator().manual_seed(4))
        states.append(adapter_state(unet))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_names_are_whole_parts_of_dotted_names():
    block = nn.ModuleDict({"to_q": nn.Linear(2, 2), "into_q": nn.Linear(2, 2), "inner": ResBlock(8, 8, 4, groups=8)})
    assert inject(block, 1, 1, ["to_q"]) == ["to_q"]
    assert inject(block, 1, 1, ["inner.conv1", "conv1"], name="b") == ["inner.conv1"]
    assert "inner.conv1" in adaptable_layers(block)
    assert "to_q.base" not in adaptable_layers(block)


# ------------------------------------------------------------------------------------------------------------- what it refuses


def test_bad_input():
    unet = network()
    with pytest.raises(ValueError, match=r"no linear layer or convolution is called 'to_z'; there are .*to_k"):
        inject(unet, 2, 2, ["to_q", "to_z"])
    with pytest.raises(ValueError, match=r"rank is 0 .* expected a rank of 1"):
        inject(unet, 0, 2, ["to_q"])
    with pytest.raises(ValueError, match="a name without dots"):
        inject(unet, 1, 2, ["to_q"], name="a.b")
    assert all(p.requires_grad for p in unet.parameters())
    for change in (merge, unmerge, remove, adapter_state, lambda u: set_scale(u, 1)):
        with pytest.raises(ValueError, match="no adapters; inject or load one first"):
            change(unet)
    with pytest.raises(TypeError, match=r"GroupNorm.* is neither a linear layer nor a convolution"):
        LoRA(nn.GroupNorm(2, 4))
    with pytest.raises(TypeError, match="one group"):
        LoRA(nn.Conv2d(4, 4, 3, groups=4))
    inject(unet, 1, 1, ["to_q"])
    with pytest.raises(ValueError, match="no adapter 'other'; it has default"):
        set_scale(unet, 1.0, "other")
    with pytest.raises(ValueError, match="not merged, so there is nothing to take off"):
        unmerge(unet)


def test_nothing_is_merged_twice_or_changed_while_merged():
    unet = network()
    inject(unet, 1, 1, ["to_q"])
    fill(unet)
    merge(unet)
    once = weights(unet)
    for change in (merge, lambda u: set_scale(u, 2.0), lambda u: inject(u, 1, 1, ["to_q"], name="b")):
        with pytest.raises(ValueError, match="merged into the weights already; unmerge them first"):
            change(unet)
    with pytest.raises(ValueError, match="unmerge them first"):
        load_adapter(unet, adapter_state(unet), "c")
    assert all(torch.equal(tensor, once[name]) for name, tensor in unet.state_dict().items())


def test_an_adapter_that_does_not_fit_changes_nothing():
    unet = network()
    inject(unet, 2, 2, ["to_q", "to_k"])
    state = adapter_state(unet)
    remove(unet)
    unet.requires_grad_(True)
    last = [*state][-1].rpartition(".")[0]
    cases = {
        r"a layer none.here, which this model does not have": state | {"none.here.down": torch.ones(2, 2)},
        r"only one of two factors for": {k: v for k, v in state.items() if k != f"{last}.up"},
        r"make no \(32, 24\): it is for another model": state | {f"{last}.down": torch.ones(2, 25)},
        r"are \(3, 24\) and \(32, 2\)": state | {f"{last}.down": torch.ones(3, 24)},
        r"is empty": {},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            load_adapter(unet, wrong)
    assert not any(isinstance(module, LoRA) for module in unet.modules())
    assert all(p.requires_grad for p in unet.parameters())


# ------------------------------------------------------------------------------------------------- against peft and diffusers

WORDS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # all of them, or this release of diffusers reads none
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "downsamplers.0.conv"]


def adapted(model: nn.Module, targets: list[str], **settings) -> nn.Module:
    """A network of the reference with random factors."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets} | settings
    model.add_adapter(peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = SIZE * torch.randn(p.shape, generator=g)
    return model.eval()


@pytest.fixture
def both(tmp_path):
    """A pipeline of the reference, and ours from its files: the same base weights."""

    def make(kind: str):
        pipe = reference.pipeline(kind, tmp_path / "made")
        pipe.save_pretrained(tmp_path / kind)
        return pipe, read_diffusers(tmp_path / kind, device="cpu")

    return make


@torch.no_grad()
def hear(parts, pipe) -> list[Tensor]:
    """What the text encoders and the U-Net of both sides say to the same input: ours, then theirs."""
    ids = parts.tokenizer(["a red cube", "cube cube red"])
    hidden = parts.text(ids)[0]
    given = inputs(parts.unet.cfg)
    answers = [hidden, parts.unet(**given)]
    beside = {}
    if parts.unet.cfg.pooled_dim:
        text, _ = given["pooled"].split([128, 6 * 256], dim=1)
        given["pooled"] = torch.cat([text, sizes_features(torch.arange(6.0).expand(2, 6))], dim=1)
        answers[1] = parts.unet(**given)
        beside = {"added_cond_kwargs": {"text_embeds": text, "time_ids": torch.arange(6.0).expand(2, 6)}}
    theirs = pipe.unet(given["x"], given["t"], given["context"], **beside).sample
    if isinstance(parts.text, SDXLText):
        small = pipe.text_encoder(ids[:, 0], output_hidden_states=True).hidden_states[-2]
        large = pipe.text_encoder_2(ids[:, 1], output_hidden_states=True).hidden_states[-2]
        return [*answers, torch.cat([small, large], dim=2), theirs]
    return [*answers, pipe.text_encoder(ids)[0], theirs]


def sizes_features(numbers: Tensor) -> Tensor:
    from minildm.blocks import timestep_embedding

    return timestep_embedding(numbers.flatten(), 256).reshape(2, -1)


def assert_same(parts, pipe, plain: list[Tensor], text_too: bool = True) -> None:
    hidden, out, their_hidden, their_out = hear(parts, pipe)
    torch.testing.assert_close(out, their_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden, their_hidden, rtol=1e-4, atol=1e-4)
    assert (out - plain[1]).abs().max() > 0.05
    assert not text_too or (hidden - plain[0]).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("header", [True, False])
def test_diffusers_files_are_read(both, tmp_path, kind, header):
    pipe, parts = both(kind)
    plain = hear(parts, pipe)
    adapted(pipe.unet, PEFT_TARGETS)
    adapted(pipe.text_encoder, ["q_proj", "fc1"])
    layers = {
        part: peft.get_peft_model_state_dict(network)
        for part, network in {"unet": pipe.unet, "text_encoder": pipe.text_encoder}.items()
    }
    notes = {f"{part}_lora_adapter_metadata": {"r": 3, "lora_alpha": 5} for part in layers} if header else {}
    pipe.save_lora_weights(tmp_path, **{f"{part}_lora_layers": state for part, state in layers.items()}, **notes)
    found = read_lora(tmp_path, parts.unet, parts.text)
    assert {part: len(names) for part, names in found.items()} == {part: len(s) // 2 for part, s in layers.items()}
    if not header:  # no alpha: the scale is 1, where the network in memory has 5 / 3
        for network in (parts.unet, parts.text):
            set_scale(network, 5 / 3)
    assert_same(parts, pipe, plain)


@pytest.mark.parametrize("settings", [{}, {"alpha_pattern": {"to_q": 9}, "rank_pattern": {"conv1": 2}}, {"use_rslora": True}])
def test_pefts_folder_is_read(both, tmp_path, settings):
    pipe, parts = both("sd15")
    plain = hear(parts, pipe)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=PEFT_TARGETS, **settings)
    wrapped = peft.get_peft_model(pipe.unet, config)
    g = torch.Generator().manual_seed(12)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = SIZE * torch.randn(p.shape, generator=g)
    wrapped.save_pretrained(tmp_path / "peft")
    read_lora(tmp_path / "peft", parts.unet)
    assert_same(parts, pipe, plain, text_too=False)


def test_pefts_folder_is_written(both, tmp_path):
    pipe, parts = both("sd15")
    plain = hear(parts, pipe)
    inject(parts.unet, rank=3, alpha=5, targets=ATTENTION)
    load_adapter(parts.unet, {k: v for k, v in adapter_state(parts.unet).items() if "attn2" in k})
    inject(parts.unet, rank=2, alpha=1, targets=("conv1", "proj_in"))
    fill(parts.unet)
    write_lora(tmp_path / "peft", parts.unet, layout="peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 5)
    pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "peft").eval()
    assert_same(parts, pipe, plain, text_too=False)


def as_kohya(unet: dict[str, Tensor], text: dict[str, Tensor], spell=lambda layer: layer) -> dict[str, Tensor]:
    """peft's tensors by kohya's names, made by hand; one alpha, for this release of diffusers mixes up several."""
    made = {}
    for prefix, tensors in (("lora_unet_", unet), ("lora_te_", text)):
        layers = sorted({name.partition(".lora_")[0] for name in tensors})
        for layer in layers:
            stem = layer if layer.startswith("text_model") or prefix == "lora_unet_" else f"text_model.{layer}"
            stem = prefix + spell(stem).replace(".", "_")
            made[f"{stem}.lora_down.weight"] = tensors[f"{layer}.lora_A.weight"]
            made[f"{stem}.lora_up.weight"] = tensors[f"{layer}.lora_B.weight"]
            made[f"{stem}.alpha"] = torch.tensor(2.0)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def test_kohyas_file_is_read_as_diffusers_reads_it(both, tmp_path):
    pipe, parts = both("sd15")
    plain = hear(parts, pipe)
    other = adapted(reference.unet("sd15"), ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"])
    words = adapted(reference.text("sd15", pipe.text_encoder.config.vocab_size), WORDS)
    tensors = as_kohya(peft.get_peft_model_state_dict(other), peft.get_peft_model_state_dict(words))
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    read_lora(tmp_path / "kohya.safetensors", parts.unet, parts.text)
    assert_same(parts, pipe, plain)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_what_ours_writes_the_reference_reads(both, tmp_path, layout, kind):
    pipe, parts = both(kind)
    plain = hear(parts, pipe)
    inject(parts.unet, rank=3, alpha=5, targets=(*ATTENTION, "proj_out", "ff.proj"))
    inject(parts.text, rank=2, alpha=1, targets=(*ATTENTION, "fc1", "fc2"))
    for network in (parts.unet, parts.text):
        fill(network)
    write_lora(tmp_path / "ours.safetensors", parts.unet, parts.text, layout=layout)
    pipe.load_lora_weights(tmp_path / "ours.safetensors")
    assert_same(parts, pipe, plain)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_there_and_back(tmp_path, layout):
    unet, again = network(), network()
    inject(unet, rank=4, alpha=8, targets=EVERYWHERE)
    fill(unet)
    write_lora(tmp_path / "a", unet, layout=layout)
    if layout != "peft":
        (tmp_path / "a").rename(tmp_path / "a.safetensors")
    read_lora(tmp_path / ("a" if layout == "peft" else "a.safetensors"), again)
    torch.testing.assert_close(run(again), run(unet), rtol=1e-5, atol=1e-5)
    assert (run(again) - run(network())).abs().max() > 0.1


def test_sdxls_original_names_and_two_text_encoders(tmp_path):
    cfg = UNetConfig(widths=(16, 32), depths=(0, 2), mid_depth=2, heads=(2, 2), context_dim=24, pooled_dim=20, linear=True,
                     groups=8)  # fmt: skip
    small = TextConfig(vocab_size=20, width=8, layers=2, heads=1, end_id=19)
    large = TextConfig(vocab_size=20, width=16, layers=2, heads=1, end_id=19, projection_dim=16)
    unet, text = network(cfg), reference.randomise(SDXLText(SDXLTextConfig(small, large)))
    inject(unet, 2, 1, ("to_q", "proj_in", "conv1"))
    inject(text, 2, 1, ("to_q",))
    for model in (unet, text):
        fill(model)
    write_lora(tmp_path / "ours.safetensors", unet, text)
    tensors = load_file(tmp_path / "ours.safetensors")
    assert {name.split("_text")[0] for name in tensors if "_text" in name} == {"lora_te1", "lora_te2"}

    tables = {"unet": compvis_unet(cfg.depths, cfg.blocks), "te1": TRANSFORMERS_TEXT, "te2": TRANSFORMERS_TEXT}
    original = {}
    for part, prefix, state in (
        ("unet", "", adapter_state(unet)),
        ("te1", "small.", adapter_state(text)),
        ("te2", "large.", adapter_state(text)),
    ):
        for key, tensor in state.items():
            layer, _, kind = key.rpartition(".")
            if layer.startswith(prefix):
                stem = rename(f"{layer.removeprefix(prefix)}.weight", tables[part]).removesuffix(".weight").replace(".", "_")
                end = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}[kind]
                original[f"lora_{part}_{stem}.{end}"] = tensor
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight" in original
    save_file(original, tmp_path / "sgm.safetensors")
    for file in ("ours", "sgm"):
        unet2, text2 = network(cfg), reference.randomise(SDXLText(SDXLTextConfig(small, large)))
        found = read_lora(tmp_path / f"{file}.safetensors", unet2, text2)
        assert [*found] == ["unet", "text_encoder", "text_encoder_2"]
        assert torch.equal(run(unet2), run(unet))
        for one, two in zip(text.parameters(), text2.parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_linear_file_fits_a_convolution_of_one_pixel(tmp_path):
    linear, conv = network(UNetConfig(**vars(TINY) | {"linear": True})), network()
    inject(linear, 2, 2, ("proj_in",))
    fill(linear)
    write_lora(tmp_path / "a.safetensors", linear)
    read_lora(tmp_path / "a.safetensors", conv)
    updates = [{n: m.update().flatten(1) for n, m in u.named_modules() if isinstance(m, LoRA)} for u in (linear, conv)]
    assert updates[0].keys() == updates[1].keys() != set()
    assert all(torch.equal(update, updates[1][name]) for name, update in updates[0].items())


def test_files_that_are_refused(tmp_path):
    unet = network()
    inject(unet, 2, 2, ("to_q",))
    write_lora(tmp_path / "good.safetensors", unet)
    good = load_file(tmp_path / "good.safetensors")
    remove(unet)
    stem = next(iter(good)).split(".")[0]
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}
    cases = {
        r"1 of \d+ tensors in .* \['lora_te_.*give text": good | text,
        r"no plain LoRA": good | {f"{stem}.dora_scale": torch.ones(1, 32)},
        r"is for another model": {name.replace("down_blocks_1", "down_blocks_2"): t for name, t in good.items()},
        r"which make no \(32, 32\)": good | {f"{stem}.lora_down.weight": torch.ones(2, 31)},
        r"only one of two factors": {k: v for k, v in good.items() if k != f"{stem}.lora_up.weight"},
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path / "bad.safetensors", unet)
        assert not any(isinstance(module, LoRA) for module in unet.modules())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*: expected adapter_model.safetensors or"):
        read_lora(tmp_path / "empty", unet)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_lora(tmp_path / "nowhere.safetensors", unet)


def test_what_cannot_be_written(tmp_path):
    unet = network()
    text = reference.randomise(SDXLText(SDXLTextConfig(*[TextConfig(vocab_size=20, width=8, layers=2, heads=1)] * 2)))
    with pytest.raises(ValueError, match="no adapters"):
        write_lora(tmp_path / "a.safetensors", unet)
    inject(unet, 1, 1, ("to_q",))
    inject(text, 1, 1, ("to_q",))
    with pytest.raises(ValueError, match=r"layout is 'webui'; choose"):
        write_lora(tmp_path / "a.safetensors", unet, layout="webui")
    with pytest.raises(ValueError, match="peft writes a folder for each network"):
        write_lora(tmp_path / "a", unet, text, layout="peft")
    with pytest.raises(ValueError, match="no adapter 'b'; it has default"):
        write_lora(tmp_path / "a.safetensors", unet, name="b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_that_it_is_of_torch(tmp_path):
    unet = network()
    inject(unet, 1, 1, ("to_q",))
    write_lora(tmp_path / "a.safetensors", unet, layout="diffusers")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "a.safetensors"))
    assert rename("mid.attn.blocks.0.attn1.to_q.weight", DIFFUSERS_UNET).removesuffix(".weight") in str(
        [*load_file(tmp_path / "a.safetensors")]
    )


def test_a_model_is_not_written_with_adapters_in_it(tmp_path):
    pipe = minildm.load("shapes32")
    plain = pipe.unet.state_dict()
    inject(pipe.unet, 1, 1, ("to_q",))
    for write in (pipe.save, pipe.to_diffusers):
        with pytest.raises(ValueError, match=r"unet carries adapters, .* merge and remove them"):
            write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    remove(pipe.unet)
    pipe.save(tmp_path / "model")
    again = minildm.load(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in again.items())
