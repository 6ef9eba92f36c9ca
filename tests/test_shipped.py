"""What comes with the package: it opens by name, does what its file says, and one command makes it anew."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import minildm
from minildm.__main__ import _parser, main
from minildm.data import Emoji, find_emoji_font
from minildm.files import WEIGHTS
from minildm.folder import Pictures
from minildm.metrics import load_judge
from minildm.recipes import Recipe
from minildm.scores import clip_score
from minildm.shapes import FIELDS, Shapes
from minildm.shipped import MODELS, SAMPLING, folder_of, load_clip, measure, measure_copies
from minildm.train import Fit

README = (Path(__file__).parents[1] / "README.md").read_text()


OF_SHAPES = ("shapes32", "shapes64")


def brief(seed: int) -> tuple[Shapes, Recipe]:
    return Shapes(seed=seed), Recipe.small(vae_steps=2, word_steps=2, steps=2, pictures=64, seed=seed)


def about(folder) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        return f.metadata()


@pytest.mark.parametrize("name", OF_SHAPES)
def test_it_does_what_its_file_says(name):
    pipe = minildm.load(name)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text) for p in part.parameters()} == {torch.float32}
    stated = json.loads(about(WEIGHTS / name)["figures"])
    figures, _ = measure(pipe, judged=48, objects=MODELS[name]()[0].objects)
    for what in ("reconstructions", "samples", "held_out_samples"):
        low, high = figures[what]["interval_95"]
        assert low - 0.01 <= stated[what]["all_correct"] <= high + 0.01, (what, figures[what]["all_correct"])
    assert stated["samples"]["count"] == 512


def test_the_emoji_model_knows_by_heart_what_its_file_says():
    try:
        find_emoji_font()
    except FileNotFoundError as error:
        pytest.skip(f"needs a colour emoji font: {error}")
    dataset, said = Emoji(size=32), about(WEIGHTS / "emoji")
    if len(dataset) != json.loads(said["choices"])["dataset_size"]:
        pytest.skip("another version of the emoji font, with other pictures, than the model was trained on")
    stated, (figures, _) = json.loads(said["figures"]), measure_copies(minildm.load("emoji"), dataset, judged=64)
    share = stated["nearest_is_its_own"]
    assert abs(figures["nearest_is_its_own"] - share) <= 3 * (share * (1 - share) / 64) ** 0.5 + 0.02
    assert figures["reconstructions_rms"] == pytest.approx(stated["reconstructions_rms"], rel=0.1)
    assert figures["samples_rms"] == pytest.approx(stated["samples_rms"], rel=0.2)
    assert stated["count"] == 512


@pytest.mark.parametrize("name", MODELS)
def test_its_file_says_how_it_was_made(name):
    said = about(WEIGHTS / name)
    assert said["recipe"] == f"python -m minildm ship {name} --seed 0"
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(said["choices"])["second"].items()}
    recipe = MODELS[name]()[1]
    assert Fit(**chosen) == recipe.second  # what Fit has learned since is at its default
    assert json.loads(said["choices"])["unet"]["widths"] == list(recipe.unet.widths)
    assert {"torch", "python", "processor", "minildm"} <= set(said)
    assert json.loads(said["choices"])["dataset"] == ("emoji" if name == "emoji" else "shapes")


class Parrot:
    """Stands for a pipeline: gives back the pictures of its captions, the first of them wrong."""

    guidance_scale = 1.0

    def __init__(self, dataset):
        self.pictures = dict(zip(dataset.captions, dataset.batch(range(len(dataset)))[0] / 2 + 0.5, strict=True))

    def __call__(self, captions, **sampling):
        drawn = torch.stack([self.pictures[caption] for caption in captions])
        drawn[0] = self.pictures[captions[1]]
        return drawn

    def encode(self, images):
        return images

    def decode(self, z):
        return z * 0.9


def test_what_was_learned_by_heart_is_counted():
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = Pictures("noise", pixels, [f"number {k}" for k in range(20)])
    figures, pictures = measure_copies(Parrot(dataset), dataset, judged=10)
    assert figures["nearest_is_its_own"] == pytest.approx(0.9)
    assert figures["count"] == len(pictures["samples"]) == 10
    assert figures["samples_rms"] == pytest.approx(0, abs=1e-6)  # the median
    assert 0.01 < figures["reconstructions_rms"] < 0.1


@torch.no_grad()
def test_its_two_encoders_find_each_other():
    name = "shapes32"
    clip, tokenizer = load_clip(name)
    x, captions = MODELS[name]()[0].batch(range(5_000_000, 5_000_064))  # never trained on
    image, text = clip(x, tokenizer(captions))
    alike = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    assert (alike.argmax(dim=1) == torch.arange(64)).float().mean() > 0.6
    assert clip_score(image, text) > clip_score(image, text.roll(1, dims=0)) + 20
    for key, p in minildm.load(name).text.state_dict().items():
        assert torch.equal(p, clip.text.state_dict()[key])
    with pytest.raises(FileNotFoundError, match="'shapes33' is shipped; there are shapes32"):
        load_clip("shapes33")
    with pytest.raises(FileNotFoundError, match="shapes64 learned with its U-Net, and has no image encoder"):
        load_clip("shapes64")


def test_the_readmes_python_does_what_it_says():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    for name, shape in re.findall(r"^(\w+) = .*# \((\d+(?:, \d+)+)\)", code, re.MULTILINE):
        assert tuple(names[name].shape) == tuple(map(int, shape.split(", "))), name
    read = load_judge()[0].read(torch.cat([names["images"], names["redrawn"]]) * 2 - 1)
    colors = [FIELDS["color"][k] for k in read[:, 2].tolist()]
    assert colors == ["blue"] * 4 + ["red"]
    assert {FIELDS["shape"][k] for k in read[:, 3].tolist()} == {"ring"}


@pytest.mark.parametrize("name", ["shapes64"])
def test_it_keeps_two_objects_apart_in_every_company(name):
    figures = json.loads(about(WEIGHTS / name)["figures"])
    wanted = {"reconstructions": 0.99, "samples": 0.97, "held_out_samples": 0.90}
    assert {what: figures[what]["all_correct"] >= least for what, least in wanted.items()} == dict.fromkeys(wanted, True)
    assert SAMPLING["steps"] == 20


def test_all_that_is_shipped_stays_small():
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 25 * 2**20


def test_one_command_makes_it_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "shapes32", brief)
    for _ in range(2):  # the second replaces the first
        assert main(["ship", "shapes32", "--out", str(tmp_path), "--judged", "8", "--quiet"]) == 0
    assert "wrote" in capsys.readouterr().out
    made = tmp_path / "shapes32"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "shapes32"}
    with safe_open(made / "model.safetensors", framework="pt") as f:
        dtypes = {name: f.get_tensor(name).dtype for name in f.keys()}  # noqa: SIM118
    assert dtypes.pop("alpha_bar") == torch.float64
    assert set(dtypes.values()) == {torch.float16}
    assert json.loads(about(made)["figures"])["samples"]["count"] == 8
    rounded, trained = minildm.load(made).to(torch.float32), minildm.load(tmp_path / "model")
    for name, p in trained.unet.state_dict().items():
        assert torch.equal(rounded.unet.state_dict()[name], p.half().float())
    assert {p.name for p in made.iterdir()} == {p.name for p in (WEIGHTS / "shapes32").iterdir()}


def test_the_command_line_knows_them_all():
    for name in MODELS:
        assert _parser().parse_args(["ship", name]).name == name
        assert folder_of(name).is_dir()


def test_a_name_that_is_not_shipped_is_no_model():
    assert folder_of("shapes33") is None
    with pytest.raises(FileNotFoundError, match="shapes32"):
        minildm.load("shapes33")
