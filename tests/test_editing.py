"""Editing: what must be kept is kept, whatever the sampler, and pictures are those of the reference's pipelines."""

import diffusers
import pytest
import reference
import torch
from torch.testing import assert_close

from minildm.editing import keep, latent_mask, skipped, with_mask
from minildm.guidance import guided
from minildm.pipeline import Pipeline
from minildm.samplers import SAMPLERS, ddim, ddpm
from minildm.schedule import PREDICTION_TYPES, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = NoiseSchedule.scaled_linear()
ZERO = SD.zero_terminal_snr()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


KNOWN = 0.8 * randn(2, 4, 6, 6, seed=1) + 0.3
MASK = (randn(2, 1, 6, 6, seed=2) > 0).double()


def model(x, t):
    """Mixes neighbours, so that what is kept changes what is repainted."""
    w = t.view(-1, 1, 1, 1) / 1000
    return torch.tanh((1 + w) * x + 0.5 * x.roll(1, dims=-1) - 0.3 * x.roll(1, dims=-2)) + 0.2 * torch.sin(3 * w + x)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_ends_at_what_is_known(sampler, schedule, prediction_type):
    spacing = "leading" if prediction_type == "epsilon" else "trailing"
    holed = keep(model, schedule, KNOWN, MASK, prediction_type)
    options = {"steps": 7, "spacing": spacing, "prediction_type": prediction_type}
    believed = []
    z = sampler(
        holed, randn(2, 4, 6, 6), schedule, **options, generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, x, x0: believed.append(x0),
    )  # fmt: skip
    # the sigmas of euler and heun begin at 4096 where the schedule ends at 0; ddim stops at the first alpha_bar
    loose = {"euler": 1e-3, "heun": 1e-3, "ddim": 0.1}.get(sampler.__name__, 1e-9)
    assert_close((1 - MASK) * z, (1 - MASK) * KNOWN, rtol=0, atol=loose)
    assert_close((1 - MASK) * believed[-1], (1 - MASK) * KNOWN, rtol=0, atol=1e-3)
    free = sampler(model, randn(2, 4, 6, 6), schedule, **options, generator=torch.Generator().manual_seed(3))
    assert ((z - free) * MASK).abs().max() > 0.01  # what is repainted has seen what is kept


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_the_way_x_is_what_is_known_with_the_right_noise(eta):
    seen, x = [], randn(400, 1, 6, 6)
    holed = keep(lambda x, t: 0 * x, ZERO, KNOWN[:1, :1], 0 * MASK[:1], "v_prediction")
    ddim(
        holed, x, ZERO, steps=10, eta=eta, spacing="trailing", prediction_type="v_prediction",
        generator=torch.Generator().manual_seed(4), callback=lambda i, t, x, x0: seen.append(x),
    )  # fmt: skip
    for t, x in zip(ZERO.timesteps(10, "trailing")[1:], seen, strict=False):
        a = ZERO.alpha_bar[t]
        assert_close(x.mean(0), a.sqrt() * KNOWN[0, :1], rtol=0, atol=0.25)
        noise = (x - a.sqrt() * KNOWN[:1, :1]) / (1 - a).sqrt()
        assert abs(noise.mean()) < 0.05
        assert abs(noise.std() - 1) < 0.05


def blended(x, noise, schedule, steps):
    """As the reference repaints with 4 channels: after each of ddim's steps what is known is put back, noised."""
    timesteps = schedule.timesteps(steps, "trailing")
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        t_batch = torch.full((len(x),), t)
        x0 = schedule.to_x0(model(x, t_batch), x, t, "v_prediction")
        epsilon = schedule.to_epsilon(model(x, t_batch), x, t, "v_prediction")
        a = schedule.alpha_bar[t_next or 0].item()
        x = a**0.5 * x0 + (1 - a) ** 0.5 * epsilon
        x = MASK * x + (1 - MASK) * (KNOWN if t_next is None else schedule.add_noise(KNOWN, noise, t_next))
    return x


def test_with_ddim_it_is_blending_after_each_step():
    noise = randn(2, 4, 6, 6)
    holed = keep(model, ZERO, KNOWN, MASK, "v_prediction")
    z = ddim(holed, noise, ZERO, steps=8, spacing="trailing", prediction_type="v_prediction")
    assert_close(MASK * z, MASK * blended(noise, noise, ZERO, 8))


def test_masks_of_one_and_of_nothing_and_soft_ones():
    x, t = randn(2, 4, 6, 6), torch.tensor([700, 700])
    assert torch.equal(keep(model, SD, KNOWN, torch.ones(1, 1, 6, 6))(x, t), model(x, t))
    half = SD.to_x0(keep(model, SD, KNOWN[:1], torch.full((1, 1, 6, 6), 0.5))(x, t), x, 700)
    assert_close(half, (SD.to_x0(model(x, t), x, 700) + KNOWN[:1]) / 2)
    assert keep(model, SD, KNOWN, MASK)(x.float(), t).dtype == torch.float32


def test_ddpm_draws_the_kept_part_too():
    holed = keep(model, SD, KNOWN, MASK)
    with pytest.raises(ValueError, match="one a sample"):
        ddpm(holed, randn(2, 4, 6, 6), SD, steps=2, generator=[torch.Generator()])


def test_an_inpainting_unet_sees_latents_mask_and_masked_picture_in_this_order():
    seen = []

    def unet(x, t, context):
        seen.append((x, context))
        return x[:, :4]

    x, masked, t = randn(2, 4, 6, 6), randn(1, 4, 6, 6, seed=4), torch.tensor([5, 5])
    two = guided(with_mask(unet, MASK, masked), randn(2, 3, 8), randn(1, 3, 8, seed=1), scale=3.0)
    two(x, t)
    joined, context = seen[0]
    assert joined.shape == (4, 9, 6, 6)
    assert context.shape == (4, 3, 8)
    assert torch.equal(joined, torch.cat([torch.cat([x, x]), torch.cat([MASK, MASK]), masked.expand(4, 4, 6, 6)], dim=1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"known": (3, 4, 6, 6)}, r"known is \(3, 4, 6, 6\); expected \(2 or 1, 4, 6, 6\)"),
        ({"known": (2, 4, 6, 5)}, r"known is"),
        ({"mask": (2, 4, 6, 6)}, r"mask is \(2, 4, 6, 6\); expected \(2 or 1, 1, 6, 6\)"),
        ({"mask": (1, 6, 6)}, r"mask is"),
    ],
)
def test_what_does_not_fit_is_named(shapes, message):
    parts = {
        name: torch.zeros(shapes.get(name, shape)) for name, shape in {"known": (2, 4, 6, 6), "mask": (2, 1, 6, 6)}.items()
    }
    x, t = randn(2, 4, 6, 6), torch.tensor([5, 5])
    with pytest.raises(ValueError, match=message):
        keep(model, SD, **parts)(x, t)
    with pytest.raises(ValueError, match=message.replace("known", "masked")):
        with_mask(lambda x, t: x, parts["mask"], parts["known"])(x, t)


def test_a_position_is_repainted_as_soon_as_one_of_its_pixels_is():
    mask = torch.zeros(1, 1, 8, 12)
    mask[0, 0, 3, 4], mask[0, 0, 5, 11] = 1, 0.25
    assert torch.equal(latent_mask(mask, 4), torch.tensor([[[[0, 1, 0], [0, 0, 0.25]]]]))
    blocks = (torch.rand(2, 1, 4, 4) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(latent_mask(blocks, 4), torch.nn.functional.interpolate(blocks, size=(4, 4)))  # the reference's way


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((1, 1, 8, 8), 255.0), "mask ranges from 255 to 255.*divide bytes by 255"),
        (torch.full((1, 1, 8, 8), float("nan")), "mask ranges from nan"),
        (-torch.ones(1, 1, 8, 8), "ranges from -1"),
        (torch.zeros(1, 3, 8, 8), r"mask is \(1, 3, 8, 8\); expected \(N, 1, H, W\)"),
        (torch.zeros(8, 8), r"mask is \(8, 8\)"),
        (torch.zeros(1, 1, 8, 6), "multiples of 4"),
    ],
)
def test_masks_are_checked(mask, message):
    with pytest.raises(ValueError, match=message):
        latent_mask(mask, 4)


def test_strength_is_rounded_as_the_reference_rounds_it():
    class Pipe:
        scheduler = diffusers.DDIMScheduler(**reference.DDIM)

    for steps in (1, 7, 20, 50):
        Pipe.scheduler.set_timesteps(steps)
        for percent in range(101):
            _, left = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(Pipe, steps, percent / 100, "cpu")
            assert steps - skipped(steps, percent / 100) == left
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"strength is {wrong}"):
            skipped(20, wrong)


PROMPTS, NEGATIVE = ["a red cube", "2 red cubes, red!"], "cube"
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
HOLE = torch.zeros(1, 1, 16, 16)
HOLE[..., 4:12, 2:10] = 1  # between positions


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference's parts and our pipeline of the same weights, with 4 channels and with 9."""
    pairs = {}
    for channels in (4, 9):
        folder = tmp_path_factory.mktemp(f"channels{channels}")
        theirs = reference.pipeline("sd15", folder, unet=reference.unet("sd15", in_channels=channels))
        diffusers.StableDiffusionInpaintPipeline(**theirs.components).save_pretrained(folder / "model")
        pairs[channels] = theirs.components, Pipeline.load(folder / "model", device="cpu")
    return pairs


def both(pair, channels, cls, strength, mask=None, steps=5):
    """The same edit by ours and by the reference, from the same latents and noise; sampled by DDIM."""
    components, ours = pair[channels]
    theirs = getattr(diffusers, cls)(**components)
    theirs.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(s) for s in (8, 9)]
    beside = {} if mask is None else {"mask_image": mask}
    if mask is not None:
        beside["masked_image_latents"] = ours.encode(torch.where(mask == 0, IMAGES, 0.5))
    wanted = theirs(
        PROMPTS, image=ours.encode(IMAGES), strength=strength, num_inference_steps=steps, guidance_scale=4.0,
        negative_prompt=[NEGATIVE] * 2, generator=noise, output_type="pt", **beside,
    ).images  # fmt: skip
    options = {"image": IMAGES, "strength": strength, "mask": mask, "sampler": "ddim", "seed": 8}
    return ours(PROMPTS, NEGATIVE, steps=steps, guidance_scale=4.0, **options), wanted


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99])
def test_image_to_image_draws_what_the_reference_draws(pair, strength):
    given, wanted = both(pair, 4, "StableDiffusionImg2ImgPipeline", strength)
    assert_close(given, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.1


@pytest.mark.parametrize(("channels", "strength"), [(4, 0.5), (4, 0.99), (9, 0.5), (9, 1.0)])
def test_inpainting_draws_what_the_reference_draws(pair, channels, strength):
    given, wanted = both(pair, channels, "StableDiffusionInpaintPipeline", strength, HOLE)
    assert_close(given, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.1
    other, _ = both(pair, channels, "StableDiffusionInpaintPipeline", strength, 1 - HOLE)
    assert (given - other).abs().max() > 0.05


def test_from_pure_noise_with_4_channels_both_keep_the_same_latents(pair, monkeypatch):
    # At strength 1 the reference shows the network noise alone, and from the second step on the known picture in that noise.
    # Ours takes the drawn x for the known picture in another noise, and stays with it: no step contradicts the one before.
    components, ours = pair[4]
    monkeypatch.setattr(ours, "decode", lambda z: z)
    theirs = diffusers.StableDiffusionInpaintPipeline(**components)
    theirs.set_progress_bar_config(disable=True)
    known, cells = ours.encode(IMAGES), latent_mask(HOLE, 2)
    wanted = theirs(
        PROMPTS, image=known, mask_image=HOLE, masked_image_latents=known, strength=1.0, num_inference_steps=5,
        output_type="latent", generator=[torch.Generator().manual_seed(s) for s in (8, 9)],
    ).images  # fmt: skip
    given = ours(PROMPTS, image=IMAGES, mask=HOLE, strength=1.0, steps=5, sampler="ddim", seed=8)
    assert_close(given * (1 - cells), known * (1 - cells))
    assert_close(wanted * (1 - cells), known * (1 - cells))
    assert ((given - wanted) * cells).abs().mean() < 0.3 * wanted.std()
