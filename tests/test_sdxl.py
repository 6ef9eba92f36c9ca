"""SDXL: two text encoders, sizes, crops and scores, and the refiner that takes over, all as in the reference."""

import warnings
from dataclasses import replace

import pytest
import reference
import torch
from reference import diffusers
from torch import Tensor

from minildm.pipeline import Pipeline
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.sdxl import Framing, SDXLText, SDXLTextConfig, TokenizerPair, describe, hand_over
from minildm.tiling import decode_tiled

# diffusers 0.42 hands torch tensors to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
PROMPTS = ["a red cube", "2 red cubes, red!"]
GUIDED = {"num_inference_steps": 5, "guidance_scale": 4.0}
OURS = {"steps": 5, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return both("sdxl", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    return both("refiner", tmp_path_factory.mktemp("refiner"))


def both(kind, folder):
    """The reference's pipeline with Euler's method, as published, and ours, read from what it wrote."""
    theirs = reference.pipeline(
        kind, folder, scheduler=diffusers.EulerDiscreteScheduler(**reference.SCHEDULE, timestep_spacing="leading")
    )
    theirs.save_pretrained(folder / "model")
    return theirs, Pipeline.load(folder / "model", device="cpu")


def agree(given: Tensor, wanted: Tensor) -> bool:
    assert wanted.std() > 0.1
    return ((given - wanted).abs().max() / wanted.abs().max()).item() <= 1e-4


# -------------------------------------------------------------------------------------------------------- the same pictures


@pytest.mark.parametrize("negative", ["", "cube"])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_sdxl_draws_what_the_reference_draws(base, negative, sampler):
    """Without a negative prompt the reference moves away from zeros, and so do we."""
    theirs, ours = base
    euler, x = theirs.scheduler, torch.randn(2, 4, 8, 8)
    theirs.scheduler = euler if sampler == "euler" else diffusers.DDIMScheduler(**reference.DDIM)
    wanted = theirs(PROMPTS, negative_prompt=[negative] * 2 if negative else None, latents=x, output_type="pt", **GUIDED).images
    theirs.scheduler = euler
    assert agree(ours(PROMPTS, negative, sampler=sampler, latents=x, **OURS), wanted)


def test_an_empty_negative_prompt_is_not_the_empty_caption(base):
    _, ours = base
    zeros, caption = ours.condition([""], negative=True), ours.condition([""])
    assert not zeros["context"].any()
    assert not zeros["pooled"][:, :128].any()
    assert torch.equal(zeros["pooled"][:, 128:], caption["pooled"][:, 128:])  # the sizes stay
    assert caption["context"].any()
    assert ours.condition(["cube"], negative=True)["context"].any()


def test_sizes_and_crops_reach_the_picture_as_in_the_reference(base):
    theirs, ours = base
    x = torch.randn(2, 4, 8, 8)
    sizes = {"original_size": (100, 200), "crops_coords_top_left": (30, 4), "target_size": (64, 48)}
    wanted = theirs(PROMPTS, negative_prompt=["cube"] * 2, latents=x, output_type="pt", **sizes, **GUIDED).images
    # the reference tells the negative prompt the same unless told otherwise
    framing = Framing(original=(100, 200), crop=(30, 4), target=(64, 48))
    given = ours(PROMPTS, "cube", sampler="euler", latents=x, framing=framing, **OURS)
    assert agree(given, wanted)
    assert not agree(ours(PROMPTS, "cube", sampler="euler", latents=x, **OURS), wanted)


@pytest.mark.parametrize("refine_from", [0.5, 0.8])
def test_the_refiner_takes_over_as_in_the_reference(base, refiner, refine_from):
    x, score = torch.randn(2, 4, 8, 8), {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.5}
    half_done = base[0](
        PROMPTS, negative_prompt=["cube"] * 2, latents=x, output_type="latent", denoising_end=refine_from, **GUIDED
    ).images
    wanted = refiner[0](
        PROMPTS, negative_prompt=["cube"] * 2, image=half_done, output_type="pt", denoising_start=refine_from,
        original_size=(16, 16), target_size=(16, 16), **score, **GUIDED
    ).images  # fmt: skip
    framing = Framing(score=7.0, negative_score=1.5)
    ours = {"sampler": "euler", "latents": x, "framing": framing, **OURS}
    assert agree(base[1](PROMPTS, "cube", refiner=refiner[1], refine_from=refine_from, **ours), wanted)
    assert not agree(base[1](PROMPTS, "cube", **ours), wanted)


def test_a_refiner_that_takes_over_at_the_end_changes_nothing(base, refiner):
    x = torch.randn(1, 4, 8, 8)
    alone = base[1]("a cube", sampler="dpmpp_2m", latents=x, steps=3)
    assert torch.equal(base[1]("a cube", sampler="dpmpp_2m", latents=x, steps=3, refiner=refiner[1], refine_from=1.0), alone)
    with pytest.raises(ValueError, match=r"refine_from is 1\.5"):
        base[1]("a cube", refiner=refiner[1], refine_from=1.5)
    with pytest.raises(ValueError, match="the refiner predicts v_prediction, this model epsilon"):
        base[1]("a cube", refiner=replace(refiner[1], prediction_type="v_prediction"))


# ------------------------------------------------------------------------------------------------------------- the pieces


def test_the_published_text_encoders_join_to_2048_and_1280():
    with torch.device("meta"):
        text = SDXLText(SDXLTextConfig())
    assert text.cfg.small.width + text.cfg.large.width == 2048
    assert text.cfg.pooled_dim == 1280
    with pytest.raises(ValueError, match=r"expected \(B, 2, L\)"):
        text(torch.zeros(1, 77, dtype=torch.int64))


def test_the_pair_of_tokenizers_pads_each_in_its_way_and_warns_once(tmp_path):
    pair = TokenizerPair(reference.vocabulary(tmp_path / "a"), reference.vocabulary(tmp_path / "b", pad_id=0))
    ids = pair(PROMPTS)
    assert ids.shape == (2, 2, 77)
    assert (ids[0, 0, -1], ids[0, 1, -1]) == (pair.small.end_id, 0)
    assert torch.equal(ids[0, 0][:4], ids[0, 1][:4])
    pair.save(tmp_path / "both")
    assert torch.equal(TokenizerPair.load(tmp_path / "both")(PROMPTS), ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair("red " * 100)
    assert len(caught) == 1


def test_a_framing_is_six_numbers_or_five():
    framing = Framing(original=(100, 200), crop=(3, 4), score=7.0)
    six, five = describe(framing, (64, 32), 6), describe(framing, (64, 32), 5)
    assert (six.shape, five.shape) == ((1, 1536), (1, 1280))
    assert torch.equal(six[:, :1024], five[:, :1024])
    worse = describe(framing, (64, 32), 5, negative=True)
    assert torch.equal(worse[:, :1024], five[:, :1024])
    assert not torch.equal(worse, five)
    assert torch.equal(worse, describe(Framing((100, 200), (3, 4), score=2.5), (64, 32), 5))
    with pytest.raises(ValueError, match="takes 3 numbers"):
        describe(framing, (64, 32), 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_goes_through_the_hand_over(sampler):
    asked = {"base": [], "refiner": []}

    def expert(name):
        def model(x, t):
            asked[name].append(t[0].item())
            return 0.1 * x

        return model

    SAMPLERS[sampler](
        hand_over(expert("base"), expert("refiner"), 200), torch.randn(2, 4, 8, 8), NoiseSchedule.scaled_linear(), steps=10
    )
    assert min(asked["base"]) >= 200 > max(asked["refiner"])
    assert len(asked["base"]) > len(asked["refiner"]) > 0


# ----------------------------------------------------------------------------------------------------------- large pictures


def doubled(z: Tensor) -> Tensor:
    """A decoder that looks at one latent at a time."""
    return torch.nn.functional.interpolate(z[:, :3], scale_factor=4)


@pytest.mark.parametrize("shape", [(40, 40), (16, 47), (33, 16), (5, 90), (16, 16)])
def test_tiles_cover_a_picture_exactly_once(shape):
    z = torch.randn(2, 4, *shape)
    torch.testing.assert_close(decode_tiled(doubled, z, tile=16, overlap=4), doubled(z))


def test_only_large_pictures_are_decoded_in_tiles(base, monkeypatch):
    _, ours = base
    sizes = []
    monkeypatch.setattr(type(ours.vae), "decode", lambda vae, z: sizes.append(tuple(z.shape)) or doubled(z))
    assert ours.decode(torch.randn(2, 4, 160, 160)).shape == (2, 3, 640, 640)
    assert sizes == [(1, 4, 160, 160)] * 2
    sizes.clear()
    x = torch.rand(1, 4, 170, 160) * ours.vae.cfg.scaling_factor
    torch.testing.assert_close(ours.decode(x), doubled(x / ours.vae.cfg.scaling_factor) / 2 + 0.5)
    assert sizes == [(1, 4, 96, 96)] * 6
