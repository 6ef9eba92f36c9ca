"""Every measured figure that README.md states, or a chapter quotes from elsewhere, is what a file of measurements says.

A sentence is written here once more with gaps, and the gaps are filled from the file.  A figure that was measured anew then
turns its sentence red, and so does a number in the README's prose that has no entry here.
"""

import json
import re
import runpy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from minildm.files import WEIGHTS
from minildm.recipes import Recipe
from minildm.trainings import DEMO

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
README, MEASURED = (ROOT / "README.md").read_text(), (BENCHMARKS / "README.md").read_text()
CHAPTERS = {path.stem[:2]: json.loads(path.read_text()) for path in sorted((ROOT / "chapters").glob("*.ipynb"))}


@dataclass(frozen=True)
class Figure:
    """A sentence with gaps, and what goes into them: all that `values` takes from the file, in order."""

    where: str  # "README", "MEASURED" (tests/benchmarks/README.md), or a chapter's number
    sentence: str
    file: Path
    values: Callable[[dict], list]

    def written(self) -> str:
        """The sentence as it ought to stand there."""
        return self.sentence.format(*self.values(read(self.file)))


def read(file: Path) -> dict:
    """A file of measurements, or what a model's file says of itself."""
    if not file.exists():
        pytest.skip(f"{file.name} has not been measured yet: see tests/benchmarks/README.md")
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with safe_open(file, framework="pt") as f:
        return {name: json.loads(text) if text.startswith("{") else text for name, text in f.metadata().items()}


def spread(report: dict, key: str) -> list:
    """Median, least and most of a figure over the runs of the speedrun."""
    values = [run[key] for run in report["runs"]]
    return [statistics.median(values), min(values), max(values)]


def speedrun(report: dict) -> list:
    rest = [spread(report, key)[0] for key in ("held_out", "reconstructions")]
    return [*spread(report, "total_s"), report["judged"], *spread(report, "accuracy"), *rest]


def opponent(report: dict) -> list:
    both = report["against_the_reference"]
    ours, theirs = both["ours"], both["theirs"]
    return [theirs["processor_s"] / ours["without_text_encoder_s"], theirs["accuracy"], ours["accuracy"]]


def apart(about: dict) -> list:
    samples, unseen = about["figures"]["samples"], about["figures"]["held_out_samples"]
    return [samples["count"], samples["all_correct"], unseen["all_correct"]]


def by_heart(about: dict) -> list:
    figures = about["figures"]
    return [figures["count"], figures["nearest_is_its_own"], about["choices"]["dataset_size"]]


def errors(about: dict) -> list:
    return [about["figures"][f"{what}_rms"] for what in ("samples", "reconstructions")]


def ratios(report: dict) -> list:
    named = [report[name]["ratio"] for name in ("sd15", "decode", "imports")]
    samplers, unets = report["samplers"]["by sampler"], report["unet_step"]["by case"]
    heun = samplers["heun, v_prediction"]["ratio"]
    others = [each["ratio"] for name, each in samplers.items() if name != "heun, v_prediction"]
    unet = [f(each["ratio"] for each in unets.values()) for f in (min, max)]
    rest = [report["samplers"]["ddpm with its noise"]["ratio"], *unet, report["resolution"]["ratio"], heun]
    assert max(others) <= 0.25 < heun
    return [*named, min(others), max(others), *rest]


def at_64(report: dict) -> list:
    pixels, latents = report["runs"]["pixels"]["64"], report["runs"]["latents"]["64"]
    training, step, sample = (
        pixels[q] / latents[q] for q in ("training_flops", "flops_per_step", "sampling_flops_per_picture")
    )
    return [training, step, latents["steps"], pixels["steps"], sample]


def with_first_stage(report: dict) -> list:
    pixels, latents = report["runs"]["pixels"]["64"], report["runs"]["latents"]["64"]
    pairs = (("training_flops", "first_stage_flops"), ("training_s", "first_stage_s"))
    return [sum(pixels[q] for q in pair) / sum(latents[q] for q in pair) for pair in pairs]


def best(report: dict, network: str, kind: str) -> float:
    return max(a["all_correct"] for a in report["runs"][network][kind]["0"]["accuracy"].values())


def both(report: dict) -> list:
    return [best(report, network, kind) for kind in ("v_prediction", "flow") for network in ("unet", "dit")]


def with_epsilon(report: dict) -> list:
    ground = min(a["each"]["background"] for a in report["runs"]["unet"]["epsilon"]["0"]["accuracy"].values())
    return [best(report, "unet", "epsilon"), 100 * ground, best(report, "dit", "epsilon")]


def minutes(report: dict) -> list:
    seconds = [run["training_s"] for kinds in report["runs"].values() for seeds in kinds.values() for run in seeds.values()]
    return [min(seconds) / 60, max(seconds) / 60]


def shipped(about: dict) -> list:
    samples, unseen = about["figures"]["samples"], about["figures"]["held_out_samples"]
    return [samples["count"], unseen["count"], samples["all_correct"], unseen["all_correct"]]


def trained(about: dict) -> list:
    return [about["choices"]["second"]["steps"], about["choices"]["pictures"]]


def without_critic(about: dict) -> list:
    def numbers(text: str) -> tuple[float, ...]:
        return tuple(map(float, re.search(r"MSE ([\d.]+), sharpness ([\d.]+)", text).groups()))

    (mse, sharpness), (mse_gan, sharpness_gan) = numbers(read(MSE)["figures"]), numbers(about["figures"])
    return [1 - mse / mse_gan, sharpness, sharpness_gan]


SHAPES32, SHAPES64, EMOJI = (WEIGHTS / name / "model.safetensors" for name in ("shapes32", "shapes64", "emoji"))
SPEEDRUN, RATIOS = BENCHMARKS / "speedrun.json", BENCHMARKS / "results-cpu.json"
MSE, GAN = (WEIGHTS / f"autoencoder-emoji32-{loss}.safetensors" for loss in ("mse", "gan"))
PIXELS, BACKBONES = BENCHMARKS / "latent_against_pixels.json", BENCHMARKS / "backbones.json"
FIGURES = [
    Figure(
        "README",
        "the recipe of `make demo` trained for {:.0f} seconds, the median of three seeds ({:.0f} to {:.0f}); where others "
        "share the processor it takes longer. Of {:,} fresh captions its samples obeyed {:.1%} in every attribute ({:.1%} to "
        "{:.1%}), and {:.1%} where colour and shape had never been seen together; its autoencoder's reconstructions, the "
        "ceiling, stood at {:.1%}.",
        SPEEDRUN,
        speedrun,
    ),
    Figure(
        "README",
        "trained as its text-to-image example sets AdamW for {:.1f} times our processor time (one seed, one thread each, our "
        "text encoder given to them), obeyed {:.1%} of them, where ours obeyed {:.1%};",
        SPEEDRUN,
        opponent,
    ),
    Figure("README", "of {} fresh captions its samples obeyed {:.1%} in every attribute, {:.1%} where", SHAPES64, apart),
    Figure("README", "of {} samples {:.0%} are nearer to the training picture of their caption than to any other of the {:,}",
           EMOJI, by_heart),
    Figure("MEASURED", "(a median error of {:.3f} against {:.3f}, in the model's file)", EMOJI, errors),
    Figure(
        "MEASURED",
        "U-Net at {:.2f} of the reference's time, its decoder at {:.2f}, the import at {:.2f}; the samplers at {:.2f} to "
        "{:.2f}, `ddpm` with its noise at {:.2f}. All memory is the same. Two goals are missed: forward and backward of a "
        "U-Net are at {:.2f} to {:.2f} in place of 0.8, and over the resolutions at most at {:.2f}; and `heun` with a model "
        "that predicts v is at {:.2f} in place of 0.25.",
        RATIOS,
        ratios,
    ),
    Figure("08", "{:.0%} of its samples have every attribute right", SHAPES64, lambda about: apart(about)[1:2]),
    Figure("03", "MSE lower by {:.0%}, sharpness {:.2f} in place of {:.2f}", GAN, without_critic),
    Figure("07", "`shapes32` ships with the course: {:,} steps of training", SHAPES32, trained),
    Figure(
        "10",
        "on {} and {} pictures, judged when the model was made and stored with its weights, it is {:.3f} and {:.3f}",
        SHAPES32,
        shipped,
    ),
    Figure("10", "the same U-Net after {:,} of them, on {:,} pictures", SHAPES32, trained),
    Figure(
        "13",
        "{:.0f} times less compute: each step costs {:.1f} times less, and it needs {} steps instead of {}. A sample costs "
        "{:.1f} times less",
        PIXELS,
        at_64,
    ),
    Figure("13", "the ratio is {:.1f} in operations and {:.1f} in seconds", PIXELS, with_first_stage),
    Figure("18", "by `tests/benchmarks/backbones.py`, {:.1f} to {:.1f} minutes each", BACKBONES, minutes),
    Figure("18", "{:.2f} and {:.2f} with $v$, {:.2f} and {:.2f} with flow", BACKBONES, both),
    Figure(
        "18",
        "the U-Net has {:.2f} at best and paints the ground right in {:.0f} of 100, the transformer has {:.2f}",
        BACKBONES,
        with_epsilon,
    ),
]  # fmt: skip
# Numbers that are no measurements: names, versions, sizes, and what the tests that stand beside them count.
NO_MEASURE = [
    r"Python 3\.11", r"x86-64", r"macOS 14", r"lends about 2 GB of memory", r"about 300 lines",
    r"Stable Diffusion 1\b", r"Stable Diffusion 1, 2 or SDXL", r"64 x 64 pixels",
    r"DPM-Solver\+\+\(2M\)", r"Chapter 08", r"chapters? \d\d", r"FSDP2",
]  # fmt: skip


def plain(text: str) -> str:
    """Prose in one line: without code, and with links as their words."""
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).replace(" %", "%").split())


def prose(where: str) -> str:
    """What is written there."""
    if where in ("README", "MEASURED"):
        return plain(README if where == "README" else MEASURED)
    return plain("\n\n".join("".join(c["source"]) for c in CHAPTERS[where]["cells"] if c["cell_type"] == "markdown"))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.where} {figure.values.__name__}")
def test_a_figure_is_what_its_file_says(figure):
    assert plain(figure.written()) in prose(figure.where)


def unaccounted(readme: str) -> list[str]:
    """Numbers in the README's prose that neither a file of measurements nor a test stands behind."""
    text = re.sub(r"```.*?```", " ", readme, flags=re.DOTALL)
    before, claims, after = text.partition("## Claims and the commands that show them")  # its tests hold those
    text = before + after[after.find("\n## ") :] if claims else before
    text = plain(re.sub(r"`[^`]*`", "`", re.sub(r"^\| \[.*$", "", text, flags=re.MULTILINE)))  # test_chapters holds its column
    for figure in FIGURES:
        if figure.where == "README":
            gaps = re.split(r"\\\{[^}]*\\\}", re.escape(plain(re.sub(r"`[^`]*`", "`", figure.sentence))))
            text = re.sub(r"[\d.,%]+".join(gaps), " ", text)
    for pattern in NO_MEASURE:
        text = re.sub(pattern.replace(" %", "%"), " ", text)
    return [
        text[max(0, m.start() - 40) : m.end() + 20] for m in re.finditer(r"(?<!\w)\d+(?:[.,]\d+)*", text)
    ]  # not the 0 of x0


def test_no_number_in_the_readme_is_without_a_source():
    assert unaccounted(README) == []


def test_a_number_without_a_source_is_found():
    assert len(unaccounted(README + "\nIt is 17.3 times faster.\n")) == 1
    changed = README.replace("the recipe of `make demo` trained for", "the recipe of `make demo` trained for 3 minutes and")
    assert changed != README
    assert len(unaccounted(changed)) > 1  # the whole sentence


def test_the_speedrun_is_of_the_recipe_that_make_demo_follows():
    report = read(SPEEDRUN)
    followed = json.loads(json.dumps(asdict(Recipe.small(**DEMO))))
    assert report["recipe"] == followed
    assert [run["seed"] for run in report["runs"]] == [0, 1, 2]
    assert report["median_accuracy"] >= report["goal"] == 0.95
    assert report["median_s"] <= 300
    assert report["threads"] == 2
    both = report["against_the_reference"]
    assert both["recipe"] == followed
    assert both["threads"] == 1
    times = both["theirs"]["processor_s"] / both["ours"]["without_text_encoder_s"]
    assert times >= 5
    first = max(point["processor_s"] for point in both["theirs"]["curve"] if "reconstructions" in point)
    assert 0.45 < first / both["theirs"]["processor_s"] < 0.55  # "half of that time went into their autoencoder"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_are_whole_and_of_one_machine(device):
    results = read(BENCHMARKS / f"results-{device}.json")
    assert not any(report["quick"] for report in results.values()), "a quick run is no measurement: run `make bench`"
    assert len({json.dumps(report["where"], sort_keys=True) for report in results.values()}) == 1, (
        "measured in parts: run it whole"
    )


def test_a_ratio_sets_our_best_setting_against_the_references_best():
    compared = runpy.run_path(str(BENCHMARKS / "timing.py"))["compared"]
    taken = {"ours, a": [4, 4, 4], "ours, b": [2, 3, 8], "reference, a": [8, 8, 8], "reference, b": [4, 6, 4]}
    report = compared("what", taken, goal=0.8)
    assert report["best"] == ["ours, b", "reference, b"]
    assert report["ratio"] == 0.5  # of 0.5, 0.5 and 2: each round's own
    assert report["ratio to the plain reference"] == 0.375
    alone = compared("what", {"ours, a": [4.0]})
    assert alone["best"] == ["ours, a"]
    assert alone["ratio"] is None
