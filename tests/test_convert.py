"""Published layouts are read and written, and what does not fit is refused by name before anything is loaded."""

import json
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from diffusers.loaders import single_file_utils
from reference import diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

import minildm
from minildm import compvis, configs, convert, layouts
from minildm.__main__ import main
from minildm.clip import TextConfig, TextEncoder
from minildm.pipeline import Pipeline
from minildm.schedule import NoiseSchedule
from minildm.sdxl import SDXLText, SDXLTextConfig
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

# diffusers 0.42 hands torch tensors to numpy 2 in the old way
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not say what it predicts"),  # the warning has a test of its own
]
PROMPTS, NEGATIVE = ["a red cube", "2 red cubes, red!"], "cube"
GUIDED = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
OURS = {"steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Of each kind: the reference's pipeline, its folder, its single file, and a vocabulary for that."""
    made = {}
    for kind in reference.KINDS:
        root = tmp_path_factory.mktemp(kind)
        pipe = reference.pipeline(kind, root)
        pipe.save_pretrained(root / "folder")
        save_file(reference.single_file(kind, pipe.components), root / "model.safetensors")
        made[kind] = pipe, root / "folder", root / "model.safetensors", root / "ends"
    return made


def weights(pipe: Pipeline) -> dict[str, Tensor]:
    return {f"{n}.{k}": t for n in ("unet", "vae", "text") for k, t in getattr(pipe, n).state_dict().items()}


def same_weights(one: Pipeline, other: Pipeline) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    assert wanted.std() > 0.1  # a picture, not a grey square
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


# ------------------------------------------------------------------------------------------------------ the same pictures


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_published_folder_draws_what_the_reference_draws(published, kind):
    theirs, folder, *_ = published[kind]
    ours, x = Pipeline.from_diffusers(folder, device="cpu"), torch.randn(2, 4, 8, 8)
    wanted = theirs(PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=x, **GUIDED).images
    given = ours(PROMPTS, NEGATIVE, sampler="ddim", latents=x, **OURS)
    assert relative_error(given, wanted) <= 1e-4
    assert ours.image_size == 16
    assert ours.prediction_type == {"sd15": "epsilon", "sd21": "v_prediction"}[kind]


@pytest.mark.parametrize("kind", reference.KINDS)
def test_a_single_file_holds_the_same_model_as_the_folder(published, kind):
    _, folder, file, vocabulary = published[kind]
    one = Pipeline.from_compvis(file, vocabulary, device="cpu")
    other = Pipeline.from_diffusers(folder, device="cpu")
    assert same_weights(one, other)
    assert (one.unet.cfg, one.vae.cfg) == (other.unet.cfg, other.vae.cfg)
    assert (one.prediction_type, one.spacing, one.zero_negative) == (other.prediction_type, other.spacing, other.zero_negative)
    torch.testing.assert_close(one.schedule.alpha_bar, other.schedule.alpha_bar)
    assert torch.equal(one.tokenizer(PROMPTS), other.tokenizer(PROMPTS))
    for a, b in zip(one.text(one.tokenizer(PROMPTS)), other.text(other.tokenizer(PROMPTS)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_was_made_here_opens_in_the_reference_and_draws_the_same(tmp_path):
    tokenizer = Tokenizer.train(["a red cube", "a blue cube", "no cube at all"] * 3, 280, context_length=16, lowercase=True)
    unet = UNet(UNetConfig(widths=(32, 64), depths=(1, 2), mid_depth=2, heads=(4, 2), blocks=1, context_dim=48, groups=8))
    vae = AutoencoderKL(VAEConfig(widths=(16, 32), blocks=1, groups=8, mid_attention=False, scaling_factor=0.7))
    cfg = TextConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=16,
        width=48,
        layers=2,
        heads=4,
        activation="gelu",
        end_id=tokenizer.end_id,
    )
    text, schedule = TextEncoder(cfg), NoiseSchedule.cosine().zero_terminal_snr()
    for part in (unet, vae, text):
        reference.randomise(part)
    ours = Pipeline(unet, vae, text, tokenizer, schedule, "v_prediction", "trailing", image_size=16)
    ours.to_diffusers(tmp_path)
    theirs, x = reference.opened(tmp_path), torch.randn(2, 4, 8, 8)
    four = {"num_inference_steps": 4}  # where 1000 is no multiple of the steps, the reference's "trailing" misses by one
    wanted = theirs(PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=x, **GUIDED | four).images
    given = ours(PROMPTS, NEGATIVE, sampler="ddim", latents=x, **OURS | {"steps": 4})
    assert (given - wanted).abs().max() <= 1e-3
    assert wanted.std() > 0.1

    back = Pipeline.load(tmp_path, device="cpu")
    assert same_weights(ours, back)
    assert (back.unet.cfg, back.vae.cfg, back.text.cfg) == (unet.cfg, vae.cfg, text.cfg)
    assert (back.prediction_type, back.spacing, back.image_size) == ("v_prediction", "trailing", 16)
    torch.testing.assert_close(back.schedule.alpha_bar, schedule.alpha_bar, rtol=0, atol=1e-12)
    assert torch.equal(back.tokenizer(PROMPTS), tokenizer(PROMPTS))


@pytest.mark.parametrize("kind", reference.KINDS)
def test_what_is_read_can_be_written_and_is_what_the_reference_wrote(published, kind, tmp_path):
    _, folder, *_ = published[kind]
    Pipeline.from_diffusers(folder, device="cpu").to_diffusers(tmp_path)
    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        given, wanted = load_file(tmp_path / file), load_file(folder / file)
        assert given.keys() == wanted.keys()
        assert all(torch.equal(given[name], wanted[name]) for name in given)
    assert same_weights(Pipeline.load(tmp_path, device="cpu"), Pipeline.load(folder, device="cpu"))
    index = json.loads((tmp_path / "model_index.json").read_text())
    theirs = reference.opened(tmp_path, getattr(diffusers, index["_class_name"]))
    assert type(theirs.text_encoder_2 if "2" in str(index.get("tokenizer_2")) else theirs.unet)
    assert theirs.scheduler.config.steps_offset == 1


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_model_that_inpaints_is_read_in_both_layouts_and_written(kind, tmp_path):
    beside = {"unet": reference.unet(kind, in_channels=9)} | ({"scheduler": reference.pipeline(kind, tmp_path).scheduler})
    theirs = reference.pipeline(kind, tmp_path, **beside)
    theirs.scheduler.register_to_config(prediction_type="epsilon")  # as both published ones
    diffusers.StableDiffusionInpaintPipeline(**theirs.components).save_pretrained(tmp_path / "folder")
    save_file(reference.single_file(kind, theirs.components), tmp_path / "model.safetensors")
    ours = Pipeline.load(tmp_path / "folder", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is guessed
        single = Pipeline.from_compvis(tmp_path / "model.safetensors", tmp_path / "ends", device="cpu")
    assert ours.unet.cfg.in_channels == 9
    assert same_weights(ours, single)
    assert ours.prediction_type == single.prediction_type == "epsilon"
    ours.to_diffusers(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    back = reference.opened(tmp_path / "again", diffusers.StableDiffusionInpaintPipeline)
    assert all(torch.equal(w, theirs.unet.state_dict()[name]) for name, w in back.unet.state_dict().items())
    assert same_weights(Pipeline.load(tmp_path / "again", device="cpu"), ours)
    ours.save(tmp_path / "own")
    assert same_weights(Pipeline.load(tmp_path / "own", device="cpu"), ours)


def test_an_sdxl_that_inpaints_is_refused(published, tmp_path):
    pipe, *_, vocabulary = published["sdxl"]
    parts = {**pipe.components, "unet": reference.unet("sdxl", in_channels=9)}
    save_file(reference.single_file("sdxl", parts), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="in_channels is 9, but the latents have 4"):
        Pipeline.from_compvis(tmp_path / "model.safetensors", vocabulary, device="cpu")


def test_a_single_file_becomes_a_folder(published, tmp_path):
    _, _, file, vocabulary = published["sdxl"]
    one = Pipeline.from_compvis(file, vocabulary, device="cpu")  # its queries, keys and values are thirds of one tensor
    one.to_diffusers(tmp_path / "theirs")
    one.save(tmp_path / "ours")
    assert same_weights(Pipeline.load(tmp_path / "theirs", device="cpu"), one)
    assert same_weights(Pipeline.load(tmp_path / "ours", device="cpu"), one)


# --------------------------------------------------------------------------------------------------------- names and counts


@pytest.mark.parametrize("preset", ["sd15", "sdxl", "sdxl_refiner"])
def test_the_references_own_converter_understands_our_compvis_names_of_a_unet(preset):
    with torch.device("meta"):
        network = UNet(getattr(UNetConfig, preset)())
    cfg, weights = configs.write_unet(network.cfg, 64) | {"class_embed_type": None}, network.state_dict()
    there = layouts.names(weights, layouts.compvis_unet(network.cfg.depths))
    file = {f"model.diffusion_model.{name}": torch.tensor(i) for i, name in enumerate(there.values())}
    read = single_file_utils.convert_ldm_unet_checkpoint(file, cfg)
    wanted = layouts.names(weights, layouts.DIFFUSERS_UNET)
    assert {name: t.item() for name, t in read.items()} == {name: i for i, name in enumerate(wanted.values())}


def test_the_references_own_converter_understands_our_compvis_names_of_an_autoencoder():
    with torch.device("meta"):
        network = AutoencoderKL(VAEConfig.sd15())
    there = layouts.names(network.state_dict(), layouts.compvis_vae(4))
    file = {f"first_stage_model.{name}": torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(there.values())}
    read = single_file_utils.convert_ldm_vae_checkpoint(file, configs.write_vae(network.cfg, 512))
    wanted = layouts.names(network.state_dict(), layouts.DIFFUSERS_VAE)
    assert {name: t.item() for name, t in read.items()} == {name: i for i, name in enumerate(wanted.values())}


def test_the_references_own_converter_understands_the_fused_names_of_openclip():
    model = reference.text("large", vocab_size=99)
    file = {f"x.{name}": t for name, t in reference.openclip_text(model.state_dict()).items()}
    read = single_file_utils.convert_open_clip_checkpoint(model, file, prefix="x.")
    wanted = {name: t for name, t in reference.prefixed_text(model.state_dict()).items() if "position_ids" not in name}
    read = {name: t for name, t in read.items() if "position_ids" not in name}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("kind", "count"), [("sd15", 1143), ("sdxl", 2515)])
def test_a_single_file_in_full_size_has_the_published_number_of_tensors_and_fits(kind, count):
    texts = {"sd15": [TextConfig.sd15()], "sdxl": [TextConfig.sdxl_l(), TextConfig.sdxl_g()]}[kind]
    networks = {}
    with torch.device("meta"):
        for name, cfg in zip(reference.TEXTS, texts, strict=False):
            arguments = {there: getattr(cfg, ours) for ours, (there, _) in configs.TEXT.items()}
            settings = reference.transformers.CLIPTextConfig(
                **arguments, intermediate_size=4 * cfg.width, projection_dim=cfg.pooled_dim
            )
            models = (reference.transformers.CLIPTextModel, reference.transformers.CLIPTextModelWithProjection)
            networks[name] = models[cfg.projection_dim is not None](settings)
        unet = configs.write_unet(getattr(UNetConfig, kind)(), 64)
        networks["unet"] = diffusers.UNet2DConditionModel.from_config(unet)
        networks["vae"] = diffusers.AutoencoderKL.from_config(configs.write_vae(VAEConfig.sd15(), 512))
        file = reference.single_file(kind, networks)
    assert len(file) == count
    assert "model.diffusion_model.output_blocks.5.2.conv.weight" in file
    assert "first_stage_model.decoder.up.3.block.2.conv2.weight" in file

    stored = {name: compvis.Stored(tuple(t.shape), None) for name, t in file.items()}
    unet = compvis.unify("unet", compvis.under("model.diffusion_model.", stored))
    vae = compvis.unify("vae", compvis.under("first_stage_model.", stored))
    assert compvis.infer_unet(unet) == getattr(UNetConfig, kind)()
    assert compvis.infer_vae(vae, VAEConfig.sd15()) == VAEConfig.sd15()
    for prefix, (_, _, preset, _) in compvis.PREFIXES.items():
        if text := compvis.unify("text_encoder", compvis.under(prefix, stored)):
            assert compvis.infer_text(text, preset) == preset


# ----------------------------------------------------------------------------------------------------------- old spellings


def test_old_names_of_the_autoencoders_attention_are_read(published, tmp_path):
    _, folder, *_ = published["sd15"]
    copy = copied(folder, tmp_path)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, before in old.items():
        state = {name.replace(f".{new}.", f".{before}."): tensor for name, tensor in state.items()}
    assert any(".proj_attn." in name for name in state)
    save_file(state, file)
    assert same_weights(Pipeline.load(copy, device="cpu"), Pipeline.load(folder, device="cpu"))


def test_text_encoders_are_read_with_and_without_prefix_and_in_every_kind_of_file(published, tmp_path):
    _, folder, *_ = published["sd15"]
    wanted = Pipeline.load(folder, device="cpu")
    copy = copied(folder, tmp_path)
    file = copy / "text_encoder" / "model.safetensors"
    bare = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    for state in (bare, reference.prefixed_text(bare)):
        save_file(state, file)
        assert same_weights(Pipeline.load(copy, device="cpu"), wanted)
    torch.save(bare, file.with_name("pytorch_model.bin"))
    file.unlink()
    assert same_weights(Pipeline.load(copy, device="cpu"), wanted)

    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    state, shards = load_file(file), {}
    for i, name in enumerate(sorted(state)):
        shards.setdefault(f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors", {})[name] = state[name]
    for name, part in shards.items():
        save_file(part, file.with_name(name))
    where = {key: name for name, part in shards.items() for key in part}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    file.unlink()
    assert same_weights(Pipeline.load(copy, device="cpu"), wanted)


def test_a_pickled_checkpoint_with_the_notes_of_its_training_is_read(published, tmp_path):
    _, folder, file, vocabulary = published["sd21"]
    state = load_file(file) | {"model_ema.decay": torch.tensor(0.999)}
    torch.save(
        {"state_dict": state, "global_step": 875000, "epoch": 3, "pytorch-lightning_version": "1.4"}, tmp_path / "a.ckpt"
    )
    pipe = Pipeline.from_compvis(tmp_path / "a.ckpt", vocabulary, device="cpu")
    assert same_weights(pipe, Pipeline.load(folder, device="cpu"))
    assert (pipe.prediction_type, pipe.image_size) == ("epsilon", 512)  # as 2.0-base, which stopped at that step


def test_the_prediction_type_of_a_single_file_can_be_given_or_noted(published, tmp_path):
    _, _, file, vocabulary = published["sd21"]
    assert Pipeline.from_compvis(file, vocabulary, device="cpu").prediction_type == "v_prediction"
    assert Pipeline.from_compvis(file, vocabulary, "epsilon", device="cpu").prediction_type == "epsilon"
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        Pipeline.from_compvis(file, vocabulary, "noise", device="cpu")
    _, _, file, vocabulary = published["sdxl"]
    save_file(load_file(file) | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, tmp_path / "v.safetensors")
    pipe = Pipeline.from_compvis(tmp_path / "v.safetensors", vocabulary, device="cpu")
    assert (pipe.prediction_type, pipe.spacing, pipe.schedule.alpha_bar[-1]) == ("v_prediction", "trailing", 0)


# ---------------------------------------------------------------------------------------------------- memory and precision


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_not_copied(published):
    _, folder, file, vocabulary = published["sd15"]
    for pipe in (Pipeline.load(folder, device="cpu"), Pipeline.from_compvis(file, vocabulary, device="cpu")):
        mapped = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(".safetensors"):
                start, end = line.split()[0].split("-")
                mapped.append(range(int(start, 16), int(end, 16)))
        outside = [name for name, t in weights(pipe).items() if not any(t.data_ptr() in area for area in mapped)]
        assert outside == []


def test_precision_is_what_is_asked_for_and_whole_on_a_cpu(published, tmp_path):
    _, folder, *_ = published["sd15"]
    half = Pipeline.load(folder, device="cpu", dtype=torch.bfloat16)
    assert {t.dtype for t in weights(half).values()} == {torch.bfloat16}
    half.to_diffusers(tmp_path)
    assert load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.bfloat16
    assert {t.dtype for t in weights(Pipeline.load(tmp_path, device="cpu")).values()} == {torch.float32}


def test_sdxls_autoencoder_stays_whole_in_float16(published):
    pipe = Pipeline.load(published["sdxl"][1], device="cpu", dtype=torch.float16)
    assert (pipe.dtype, pipe.vae.quant_conv.weight.dtype) == (torch.float16, torch.float32)
    assert pipe.decode(torch.randn(1, 4, 8, 8, dtype=torch.float16)).isfinite().all()
    assert pipe.encode(torch.rand(1, 3, 16, 16)).dtype == torch.float16


# -------------------------------------------------------------------------------------------------------------- refusals


def copied(folder: Path, where: Path) -> Path:
    """A copy of a model's folder, to damage."""
    for path in folder.rglob("*"):
        if path.is_file():
            (where / "model" / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (where / "model" / path.relative_to(folder)).write_bytes(path.read_bytes())
    return where / "model"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("unet/config.json", "time_cond_proj_dim", 256),
        ("unet/config.json", "flip_sin_to_cos", False),
        ("unet/config.json", "norm_eps", 1e-6),
        ("unet/config.json", "class_embed_type", "timestep"),
        ("unet/config.json", "addition_embed_type", "image"),
        ("unet/config.json", "addition_time_embed_dim", 8),
        ("unet/config.json", "mid_block_type", None),
        ("unet/config.json", "down_block_types", ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        ("unet/config.json", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("unet/config.json", "attention_head_dim", [1, 2, 3]),
        ("unet/config.json", "something_new", "swirl"),
        ("unet/config.json", "in_channels", 5),
        ("vae/config.json", "shift_factor", 0.1),
        ("vae/config.json", "latents_mean", [0.0, 1.0]),
        ("vae/config.json", "use_quant_conv", False),
        ("vae/config.json", "out_channels", 4),
        ("text_encoder/config.json", "model_type", "t5"),
        ("text_encoder/config.json", "layer_norm_eps", 1e-6),
        ("text_encoder/config.json", "intermediate_size", 100),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow_prediction"),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "random"),
        ("model_index.json", "_class_name", "StableDiffusion3Pipeline"),
    ],
)
def test_a_setting_that_ours_cannot_follow_is_refused_by_name(published, tmp_path, file, field, value):
    copy = copied(published["sd15"][1], tmp_path)
    edit(copy / file, **{field: value})
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline" if field == "_class_name" and "index" in file else field
    ) as e:
        Pipeline.load(copy, device="cpu")
    assert repr(value).strip("'") in str(e.value)


def test_sdxls_steps_offset_is_checked_because_its_pipeline_does_not_mend_it(published, tmp_path):
    copy = copied(published["sdxl"][1], tmp_path)
    edit(copy / "scheduler" / "scheduler_config.json", steps_offset=0)
    with pytest.raises(ValueError, match="steps_offset is 0"):
        Pipeline.load(copy, device="cpu")


def test_a_sampler_that_is_not_here_is_warned_of(published, tmp_path):
    copy = copied(published["sd15"][1], tmp_path)
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True)
    with pytest.warns(UserWarning, match="use_karras_sigmas"):
        Pipeline.load(copy, device="cpu")


def made_here(**changes: object) -> Pipeline:
    """A pipeline of ours that the reference could hold, but for the changes."""
    tokenizer = Tokenizer.train(["a cube"] * 3, 258, context_length=8)
    cfg = {
        "unet": UNetConfig(widths=(32,), depths=(1,), heads=(4,), context_dim=32, groups=8),
        "vae": VAEConfig(widths=(16,), groups=8),
        "text": TextConfig.tiny(tokenizer.vocab_size, 8),
        "schedule": NoiseSchedule.scaled_linear(),
    } | changes
    return Pipeline(
        UNet(cfg["unet"]), AutoencoderKL(cfg["vae"]), TextEncoder(cfg["text"]), tokenizer, cfg["schedule"], image_size=8
    )


PLAIN = UNetConfig(widths=(32,), depths=(1,), heads=(4,), context_dim=32, groups=8)


@pytest.mark.parametrize(
    ("change", "field", "why"),
    [
        ({"unet": replace(PLAIN, patch=2)}, "unet.patch = 2", "patchify stem"),
        ({"unet": replace(PLAIN, mid_depth=3)}, "unet.mid_depth = 3", "as deep as the last level"),
        ({"unet": replace(PLAIN, pooled_dim=128)}, "unet.pooled_dim = 128", "together with SDXL's sizes"),
        ({"unet": replace(PLAIN, pooled_dim=128 + 6 * 256)}, "unet.pooled_dim", "together with SDXL's sizes"),
        ({"vae": VAEConfig(widths=(16,), groups=8, patch=2)}, "vae.patch = 2", "patchify stem"),
        ({"text": replace(TextConfig.tiny(258, 8), skip_layers=1)}, "text.skip_layers = 1", "listens where"),
        ({"text": replace(TextConfig.tiny(258, 8), norm_hidden=False)}, "text.norm_hidden = False", "listens where"),
        ({"text": replace(TextConfig.tiny(258, 8), projection_dim=16)}, "text.projection_dim = 16", "listens where"),
    ],
)
def test_a_configuration_that_the_reference_has_not_is_refused_by_name(tmp_path, change, field, why):
    with pytest.raises(ValueError, match=why) as e:
        made_here(**change).to_diffusers(tmp_path / "new")
    assert field in str(e.value)
    assert not (tmp_path / "new").exists()
    made_here().to_diffusers(tmp_path / "new")  # without the change it is written


def test_all_that_is_wrong_with_the_weights_is_said_together_by_network(published, tmp_path):
    _, folder, file, vocabulary = published["sd15"]
    copy = copied(folder, tmp_path)
    state = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    del state["conv_in.weight"], state["mid_block.resnets.0.conv1.bias"]
    state["conv_out.weight"] = torch.zeros(3, 3)
    save_file(state, copy / "unet" / "diffusion_pytorch_model.safetensors")
    state = load_file(copy / "vae" / "diffusion_pytorch_model.safetensors") | {"surprise": torch.zeros(1)}
    save_file(state, copy / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as e:
        Pipeline.load(copy, device="cpu")
    unet, vae = str(e.value).split("; ")
    assert "unet: 2 missing (conv_in.weight, mid_block.resnets.0.conv1.bias)" in unet
    assert "1 wrongly shaped (conv_out.weight (3, 3), expected (4, 64, 3, 3))" in unet
    assert vae == "vae: 1 unexpected (surprise)"

    state = load_file(file)
    del state["model.diffusion_model.out.0.bias"]
    state |= {"first_stage_model.quant_conv.bias": torch.zeros(2), "lora.down": torch.zeros(1)}
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"unet: 1 missing \(out.0.bias\)") as e:
        Pipeline.from_compvis(tmp_path / "bad.safetensors", vocabulary, device="cpu")
    assert "vae: 1 wrongly shaped (quant_conv.bias (2,), expected (8,))" in str(e.value)
    assert "other: 1 unexpected (lora.down)" in str(e.value)


class Malicious:
    """A pickle that would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_malicious_pickle_is_not_run(published, tmp_path, form):
    path, evidence = tmp_path / "bad.ckpt", tmp_path / "evidence"
    content = {"callbacks": Malicious(evidence)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save({"state_dict": {"a": torch.zeros(1)}} | content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"which could run code and was not opened|bad.ckpt is damaged") as e:
        Pipeline.from_compvis(path, published["sd15"][3])
    assert not evidence.exists()
    assert form == "plain" or "safetensors" in str(e.value)
    if form == "plain":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert evidence.exists()  # it was dangerous


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("keep", [0, 1, 5, 1000, -1000])
def test_a_truncated_file_is_said_to_be_damaged(published, tmp_path, ending, keep):
    _, _, file, vocabulary = published["sd15"]
    path = tmp_path / f"half.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": load_file(file)}, path)
    whole = path.read_bytes() if ending == "ckpt" else file.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="damaged"):
        Pipeline.from_compvis(path, vocabulary)


def test_files_of_other_things_are_refused(published, tmp_path):
    vocabulary = published["sd15"][3]
    save_file({"lora_unet.down": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match=r"no names that begin with model\.diffusion_model\., first_stage_model\., but lora_unet"
    ):
        Pipeline.from_compvis(tmp_path / "lora.safetensors", vocabulary)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no whole Stable Diffusion"):
        Pipeline.from_compvis(tmp_path / "list.ckpt", vocabulary)
    state = load_file(published["sd15"][2])
    save_file({n: t for n, t in state.items() if not n.startswith("cond_stage")}, tmp_path / "mute.safetensors")
    with pytest.raises(ValueError, match="cond_stage_model"):
        Pipeline.from_compvis(tmp_path / "mute.safetensors", vocabulary)
    del state["model.diffusion_model.middle_block.1.proj_in.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match=r"no usable 'middle_block\.1\.proj_in\.weight'"):
        Pipeline.from_compvis(tmp_path / "hole.safetensors", vocabulary)
    with pytest.raises(FileNotFoundError, match="no file"):
        Pipeline.from_compvis(tmp_path / "none.safetensors", vocabulary)


def test_missing_and_damaged_parts_of_a_folder_are_named(published, tmp_path):
    copy = copied(published["sd15"][1], tmp_path)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights in .*unet"):
        Pipeline.load(copy)
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae.config.json is damaged"):
        Pipeline.load(copy)
    (copy / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"settings file .* is damaged"):
        Pipeline.load(copy)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*vae.config.json"):
        Pipeline.load(copy)


def test_a_vocabulary_that_is_too_large_is_refused(published, tmp_path):
    merges = [("r", "e"), ("re", "d</w>"), ("c", "u"), ("cu", "b"), ("b", "a"), ("ba", "d</w>"), ("o", "n")]
    Tokenizer(merges=merges, lowercase=True, end_of_word="</w>").save(tmp_path)
    with pytest.raises(ValueError, match="they are of two models"):
        Pipeline.from_compvis(published["sd15"][2], tmp_path, device="cpu")


# --------------------------------------------------------------------------------------------------------------- settings


def test_configurations_come_back_as_they_went():
    for preset in ("sd15", "sd21", "sdxl", "sdxl_refiner"):
        cfg = getattr(UNetConfig, preset)()
        assert configs.read_unet(json.loads(json.dumps(configs.write_unet(cfg, 64)))) == cfg
    for cfg in (VAEConfig.sd15(), VAEConfig.sdxl(), VAEConfig(widths=(32,), blocks=1, groups=16, mid_attention=False)):
        assert configs.read_vae(json.loads(json.dumps(configs.write_vae(cfg, 64)))) == cfg
    for preset in ("sd15", "sd21", "sdxl_l", "sdxl_g"):
        cfg = getattr(TextConfig, preset)()
        assert configs.read_text(configs.write_text(cfg, cfg.skip_layers == 1, 49406, 49407), cfg.skip_layers == 1) == cfg


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("sd21", {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "upcast_attention": True}),
        (
            "sdxl",
            {
                "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
            },
        ),
        (
            "sdxl_refiner",
            {
                "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": 4, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2560, "cross_attention_dim": 1280, "sample_size": 128,
            },
        ),
    ],
)  # fmt: skip
def test_the_settings_of_later_unets_are_understood(preset, changes):
    """With every field that a release of the reference writes, left at its default where the model does not change it."""
    with torch.device("meta"):
        fields = dict(diffusers.UNet2DConditionModel(block_out_channels=(32,) * 4).config)
    fields |= {
        "block_out_channels": (320, 640, 1280, 1280),
        "use_linear_projection": True,
        "num_attention_heads": None,
    } | changes
    assert configs.read_unet(json.loads(json.dumps(fields))) == getattr(UNetConfig, preset)()


def test_the_published_settings_of_sd15_are_understood():
    """As they stand in the published folder, written by a release that knew fewer fields."""
    cross, plain = ["CrossAttnDownBlock2D"] * 3, ["UpBlock2D"]
    unet = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": [*cross, "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
        "out_channels": 4, "sample_size": 64, "up_block_types": [*plain, *["CrossAttnUpBlock2D"] * 3],
    }  # fmt: skip
    assert configs.read_unet(unet) == UNetConfig.sd15()
    text = {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
    }  # fmt: skip
    assert configs.read_text(text, early=False) == replace(TextConfig.sd15(), end_id=None)
    scheduler = {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    schedule, *rest = configs.read_schedule(scheduler)
    assert torch.equal(schedule.alpha_bar, NoiseSchedule.scaled_linear().alpha_bar)
    assert rest == ["epsilon", "leading"]


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.linear(),
        NoiseSchedule.cosine(),
        NoiseSchedule.scaled_linear().zero_terminal_snr(),
        NoiseSchedule.cosine().zero_terminal_snr(),
        NoiseSchedule.linear(T=50, start=0.01, end=0.3).zero_terminal_snr(),
        NoiseSchedule(torch.linspace(0.9, 0.1, 20, dtype=torch.float64)),
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_schedules_are_written_so_that_the_reference_reads_the_same(schedule, spacing):
    fields = json.loads(json.dumps(configs.write_schedule(schedule, "v_prediction", spacing)))
    theirs = diffusers.DDIMScheduler.from_config(fields)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar, rtol=0, atol=2e-6)
    theirs.set_timesteps(7)
    assert theirs.timesteps.tolist() == schedule.timesteps(7, spacing)
    back, *rest = configs.read_schedule(fields)
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=0, atol=1e-12)
    assert rest == ["v_prediction", spacing]


def test_where_a_schedulers_file_is_silent_its_class_speaks():
    for name in sorted(configs.LEADING | configs.LINSPACE):
        theirs = getattr(diffusers, name)().config
        wanted = theirs.get("timestep_spacing", "linspace")  # DPMSolverSinglestep has no choice
        assert configs.read_schedule({"_class_name": name})[2] == wanted, name


# ---------------------------------------------------------------------------------------------------------------- opening


def test_load_opens_every_kind(published, tmp_path, monkeypatch):
    _, folder, file, vocabulary = published["sd15"]
    ours = minildm.load(folder)
    assert same_weights(ours, Pipeline.from_diffusers(folder))
    ours.save(tmp_path / "ours")
    assert same_weights(minildm.load(tmp_path / "ours"), ours)
    beside = tmp_path / "beside"
    Tokenizer.load(vocabulary).save(beside / "tokenizer")
    (beside / "model.safetensors").write_bytes(file.read_bytes())
    assert same_weights(minildm.load(beside / "model.safetensors"), ours)


def test_the_command_line_draws_with_a_published_model(published, tmp_path, capsys):
    _, folder, file, _ = published["sd15"]
    asked = ["sample", "a red cube", "--steps", "2", "-o", str(tmp_path / "a.png")]
    assert main([*asked, "--model", str(folder)]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:1000])
    assert main([*asked, "--model", str(tmp_path / "half.safetensors")]) == 1
    said = capsys.readouterr().err.strip()
    assert "half.safetensors is damaged" in said
    assert "\n" not in said


def test_without_a_vocabulary_beside_it_a_file_takes_open_clips(published, monkeypatch):
    file = published["sd15"][2]
    assert compvis.find_vocabulary(file).parent.name == "open_clip"
    monkeypatch.setattr(compvis, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6"):
        compvis.find_vocabulary(file)


def test_names_on_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert.is_hub_name("stable-diffusion-v1-5/stable-diffusion-v1-5")
    (tmp_path / "models").mkdir()
    for path in ("models/mine", "out/model", "model", "./a/b", "/a/b", "a/b/c", "../a/b"):
        assert not convert.is_hub_name(path)
    with pytest.raises(FileNotFoundError, match="no model in"):
        minildm.load("out/model")


def test_a_hub_name_is_fetched(published, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(published["sd15"][1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_weights(minildm.load("someone/something"), Pipeline.load(published["sd15"][1]))
    assert asked["name"] == "someone/something"
    from fnmatch import fnmatch

    wanted = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer_2/vocab.json",
        "text_encoder_2/model-00001-of-00002.safetensors", "scheduler/scheduler_config.json",
    ]  # fmt: skip
    spared = ["v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
              "unet/diffusion_pytorch_model.non_ema.safetensors", "safety_checker/model.safetensors"]  # fmt: skip
    assert all(any(fnmatch(file, pattern) for pattern in asked["patterns"]) for file in wanted)
    assert not any(fnmatch(file, pattern) for file in spared for pattern in asked["patterns"])


def test_without_network_or_library_a_hub_name_says_what_to_do(monkeypatch):
    with pytest.raises(OSError, match="nor could it be fetched"):
        minildm.load("nobody/nothing-at-all")  # HF_HUB_OFFLINE is set
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'minildm\[hub\]'"):
        minildm.load("nobody/nothing-at-all")


def test_sdxl_comes_back_from_our_own_format(published, tmp_path):
    ours = Pipeline.load(published["sdxl"][1], device="cpu")
    ours.save(tmp_path)
    back = Pipeline.load(tmp_path, device="cpu")
    assert same_weights(ours, back)
    assert isinstance(back.text, SDXLText)
    assert isinstance(back.text.cfg, SDXLTextConfig)
    assert back.text.cfg == ours.text.cfg
    assert back.zero_negative
    assert torch.equal(back.tokenizer(PROMPTS), ours.tokenizer(PROMPTS))
