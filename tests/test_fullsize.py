"""Stable Diffusion 1.5 in full size: weights made by the reference, saved in its layout, loaded and run by ours.

Run with `pytest -m slow tests/test_fullsize.py`: about ten minutes on two cores, 10 GB of memory and 4.3 GB of disk.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from reference import diffusers, transformers
from torch import Tensor

from minildm.compvis import find_vocabulary
from minildm.pipeline import Pipeline
from minildm.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published shapes with random weights, in the published layout."""
    root = tmp_path_factory.mktemp("sd15")
    Tokenizer.clip(find_vocabulary(root)).save(root / "vocabulary")
    text = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        eos_token_id=2,
    )
    widths = (128, 256, 512, 512)
    vae = reference.vae(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    pipe = diffusers.StableDiffusionPipeline(
        unet=reference.randomise(unet, seed=1),
        vae=vae,
        text_encoder=reference.randomise(transformers.CLIPTextModel(text), seed=3),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(root / "vocabulary"),
        scheduler=diffusers.DDIMScheduler(**reference.DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def theirs(folder):
    return reference.opened(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_diffusers(folder, device="cpu")


def agree(name: str, given: Tensor, wanted: Tensor) -> None:
    """Within 1e-4 of the largest value; prints what it is."""
    assert given.shape == wanted.shape
    assert wanted.std() > 0.05
    error = ((given - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{name}: largest relative error {error:.2e}, standard deviation {wanted.std():.3f}")
    assert error <= 1e-4


@torch.no_grad()
def test_unet(ours, theirs):
    x, t, context = torch.randn(1, 4, 64, 64), torch.tensor([481]), torch.randn(1, 77, 768)
    agree("U-Net", ours.unet(x, t, context), theirs.unet(x, t, context).sample)


@torch.no_grad()
def test_encoder(ours, theirs):
    x = torch.rand(1, 3, 512, 512) * 2 - 1
    given, wanted = ours.vae.encode(x), theirs.vae.encode(x).latent_dist
    agree("encoder, mean", given.mean, wanted.mean)
    agree("encoder, deviation", given.std, wanted.std)


@torch.no_grad()
def test_decoder(ours, theirs):
    z = torch.randn(1, 4, 64, 64)
    agree("decoder", ours.vae.decode(z), theirs.vae.decode(z).sample)


@torch.no_grad()
def test_text_encoder(ours, theirs):
    ids = ours.tokenizer([PROMPT, NEGATIVE])
    wanted = theirs.tokenizer([PROMPT, NEGATIVE], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, wanted)
    agree("text", ours.text(ids)[0], theirs.text_encoder(wanted).last_hidden_state)


def test_text_to_image(ours, theirs):
    x = torch.randn(1, 4, 64, 64)
    given = ours(PROMPT, NEGATIVE, steps=3, guidance_scale=7.5, sampler="ddim", latents=x)
    wanted = theirs(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3, guidance_scale=7.5, latents=x, output_type="pt"
    ).images
    agree("text to image", given, wanted)


FORWARD = """
import json, re, sys, time
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from reference import diffusers  # in both, so that its modules weigh the same
from minildm.pipeline import Pipeline
torch.set_num_threads(1)
folder = {folder!r}
start = time.process_time()
if {ours}:
    from minildm.configs import read_unet
    from minildm.layouts import DIFFUSERS_UNET
    from minildm.files import open_weights
    from minildm.tensors import Fitting, fill
    from minildm.unet import UNet
    with torch.device("meta"):
        unet = UNet(read_unet(json.loads(Path(folder, "config.json").read_text())))
    stored = open_weights(Path(folder, "diffusion_pytorch_model.safetensors"))
    fill(Fitting(unet, stored, DIFFUSERS_UNET), torch.device("cpu"), torch.float32)
else:
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
unet.eval()
x, t, context = torch.randn(1, 4, 64, 64), torch.tensor([481]), torch.randn(1, 77, 768)
with torch.inference_mode():
    unet(x, t, context)  # reads the weights, which are mapped, not loaded
    loaded, forward = time.process_time() - start, []
    for _ in range({rounds}):
        start = time.process_time()
        unet(x, t, context)
        forward.append(time.process_time() - start)
# VmHWM, since ru_maxrss counts what the parent process had before
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
print(json.dumps({{"loaded": loaded, "forward": min(forward), "gib": peak}}))
"""


def test_unet_costs_no_more_than_the_references(folder):
    """One forward pass at 64 x 64, batch 1, fp32, one thread: CPU time and peak memory, each in a process of its own."""
    costs = {}
    for name in ("reference", "ours", "ours", "reference"):  # there and back, so that neither has the warmer machine
        code = FORWARD.format(tests=str(Path(__file__).parent), folder=str(folder / "unet"), ours=name == "ours", rounds=3)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        costs.setdefault(name, []).append(json.loads(run.stdout.splitlines()[-1]))
    best = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in costs.items()}
    for name, cost in best.items():
        print(
            f"U-Net, {name}: {cost['forward']:.2f} s of CPU time a forward pass, {cost['loaded']:.1f} s with loading, "
            f"peak memory {cost['gib']:.2f} GiB"
        )
    ours, reference = best["ours"], best["reference"]
    assert ours["forward"] <= 1.05 * reference["forward"]  # the two runs of one library differ by as much
    assert ours["loaded"] <= 1.05 * reference["loaded"]
    assert ours["gib"] <= 1.02 * reference["gib"]
