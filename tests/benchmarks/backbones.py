"""U-Net and transformer, epsilon, velocity and flow: six ways to the same latents at equal compute.

    python tests/benchmarks/backbones.py                  # every run that the file lacks: about three minutes each on one core
    python tests/benchmarks/backbones.py dit flow 0       # one of them: network, what it predicts, seed

Every run has the same pictures, captions, autoencoder, text encoder, judge, batch and starting noise, and spends the same
number of operations on training: those of 500 steps of the small U-Net.  The U-Net has the learning rate of the shipped
model's recipe, the transformer the best of 5e-4, 1e-3 and 2e-3 in 200 steps of velocity on another seed.  Each prediction has
the schedule that it is used with here: epsilon cannot use one that ends in pure noise, so it has Stable Diffusion's own.  Ten
calls a picture: flow by straight steps, the others by ddim, of the same order, and by dpmpp_2m.  Writes backbones.json beside
this file, which chapter 18 shows.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minildm
from minildm.checkpoint import write_atomically
from minildm.dit import DiT, DiTConfig
from minildm.flow import FlowPath, flow_euler
from minildm.guidance import guided
from minildm.machine import machine
from minildm.metrics import caption_accuracy, load_judge
from minildm.samplers import ddim, dpmpp_2m
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.train import Fit, cache_latents, train_diffusion
from minildm.unet import UNet, UNetConfig

FILE = Path(__file__).with_suffix(".json")
NETWORKS = ("unet", "dit")
PREDICTIONS = ("epsilon", "v_prediction", "flow")
SEEDS = (0,)
SETTING = {
    "unet_steps": 500, "batch_size": 32, "pictures": 10_000, "ema": 0.99, "lr": {"unet": 1.5e-3, "dit": 2e-3},
    "judged": 256, "sampler_steps": 10, "guidance_scale": 3.0, "data": "Shapes, 32 pixels, one object; 8 x 8 x 4 latents",
    "clock": "CPU seconds, one thread", "schedules": {
        "epsilon": "scaled linear, spacing leading", "v_prediction": "scaled linear with zero terminal SNR, spacing trailing",
        "flow": "straight path, logit-normal times, shift 1",
    },
}  # fmt: skip


def network(name: str, seed: int) -> nn.Module:
    """A new network of one of the two kinds."""
    torch.manual_seed(seed)
    return UNet(UNetConfig.tiny()) if name == "unet" else DiT(DiTConfig.tiny())


def operations(net: nn.Module, backward: bool) -> int:
    """Multiplications and additions for one picture with a caption of 32 tokens, its backward pass included if asked for."""
    with FlopCounterMode(display=False) as counter:
        out = net(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 32, 128), torch.zeros(1, 128))
        if backward:
            out.sum().backward()
    net.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def steps_for(net: nn.Module) -> int:
    """How many steps of this network cost what the U-Net's cost."""
    return round(SETTING["unet_steps"] * operations(network("unet", 0), True) / operations(net, True))


def schedule_for(prediction: str) -> NoiseSchedule | FlowPath:
    """How the noise runs for a kind of prediction."""
    if prediction == "flow":
        return FlowPath()
    return NoiseSchedule.scaled_linear() if prediction == "epsilon" else NoiseSchedule.scaled_linear().zero_terminal_snr()


@torch.no_grad()
def draw(net: nn.Module, pipe, prediction: str, captions: list[str], noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network draws for captions, by sampler: pictures in [0, 1]."""
    model = guided(net, pipe.condition(captions), pipe.condition([""]), scale=SETTING["guidance_scale"])
    schedule, steps = schedule_for(prediction), SETTING["sampler_steps"]
    if prediction == "flow":
        return {"flow_euler": pipe.decode(flow_euler(model, noise, schedule, steps=steps))}
    options = {"prediction_type": prediction, "spacing": "leading" if prediction == "epsilon" else "trailing"}
    samplers = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
    return {name: pipe.decode(s(model, noise, schedule, steps=steps, **options)) for name, s in samplers.items()}


def measure(name: str, prediction: str, seed: int, steps: int | None = None, lr: float | None = None) -> dict:
    """One run: trains for the budget, draws, and has it judged."""
    pipe, (judge, _) = minildm.load("shapes32"), load_judge()
    encode = cache_latents(pipe.vae, Shapes(size=32), SETTING["pictures"])
    latents = yielded(encode)
    ids, empty = pipe.tokenizer(latents.captions), pipe.tokenizer([""])
    net = network(name, seed)
    cfg = Fit(
        steps=steps or steps_for(net), lr=lr or SETTING["lr"][name], batch_size=SETTING["batch_size"], seed=seed,
        ema=SETTING["ema"],
    )  # fmt: skip
    start = time.process_time()
    losses = [
        p.loss
        for p in train_diffusion(net, pipe.text, schedule_for(prediction), latents, ids, empty, cfg, prediction_type=prediction)
    ]
    seconds = time.process_time() - start
    asked = Shapes(size=32, seed=1_000).draw(range(SETTING["judged"]))
    noise = torch.randn(len(asked.captions), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    result = {
        "parameters": sum(p.numel() for p in net.parameters()), "steps": cfg.steps, "lr": cfg.lr,
        "operations_a_call": operations(net, False), "operations_a_step": cfg.batch_size * operations(net, True),
        "training_s": seconds, "loss": sum(losses[-50:]) / 50, "accuracy": {},
    }  # fmt: skip
    for sampler, pictures in draw(net, pipe, prediction, asked.captions, noise).items():
        read = caption_accuracy(judge.read(2 * pictures - 1), asked.attributes)
        mean = sum(read.each.values()) / len(read.each)
        result["accuracy"][sampler] = {"attributes": mean, "interval_95": read.interval, **asdict(read)}
    return result


def yielded(generator):
    """Runs a generator to its end, and returns what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def done() -> dict:
    """The report on the disk."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}


def note(name: str, prediction: str, seed: int, result: dict) -> None:
    """Adds one run to the report on the disk."""
    report = done()
    report["runs"].setdefault(name, {}).setdefault(prediction, {})[str(seed)] = result
    report |= {"machine": machine(), "setting": SETTING}
    write_atomically(FILE, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        wanted = [(sys.argv[1], sys.argv[2], int(sys.argv[3]))]
    else:
        wanted = [(name, prediction, seed) for seed in SEEDS for prediction in PREDICTIONS for name in NETWORKS]
    for name, prediction, seed in wanted:
        if len(sys.argv) == 4 or str(seed) not in done()["runs"].get(name, {}).get(prediction, {}):
            result = measure(name, prediction, seed)
            note(name, prediction, seed, result)
            figures = {s: f"{a['attributes']:.3f} {a['all_correct']:.3f}" for s, a in result["accuracy"].items()}
            print(name, prediction, seed, f"{result['training_s']:.0f} s", figures, flush=True)
