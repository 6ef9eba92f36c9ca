"""The command line: a demo in miniature, every option of `sample`, and one clear line for every bad input."""

import importlib.metadata
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import minildm
from minildm.__main__ import main
from minildm.adapters import write_controlnet
from minildm.controlnet import ControlNet
from minildm.lora import LoRA, inject
from minildm.lora_files import write_lora

BRIEF = ["--vae-steps", "3", "--word-steps", "3", "--steps", "3", "--pictures", "64", "--quiet"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--judged", "24", *BRIEF]) == 0
    return out


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_demo_writes_all_it_promises(demo):
    report = json.loads((demo / "demo.json").read_text())
    assert set(report["figures"]) == {"judge_on_real_pictures", "reconstructions", "samples", "held_out_samples"}
    assert report["figures"]["judge_on_real_pictures"] >= 0.99
    assert report["figures"]["samples"]["count"] == 24
    assert set(report["figures"]["samples"]["each"]) == {"background", "size", "color", "shape", "place"}
    assert set(report["times"]) == {
        "autoencoder_s",
        "encoding_s",
        "text_encoder_s",
        "diffusion_s",
        "training_s",
        "evaluation_s",
    }
    assert {"seed", "torch", "python", "processor", "peak_memory", "minildm"} <= set(report)
    assert size_of(demo / "demo.png")[0] > 800
    assert not (demo / "checkpoints").exists()
    assert {p.name for p in (demo / "model").iterdir()} == {
        "model.json", "model.safetensors", "recipe.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_sample_draws_the_same_bits_for_the_same_seed(demo, tmp_path, capsys):
    draw = ("sample", "a small red circle", "--model", demo / "model", "--seed", 3, "--steps", 4)
    for name in ("a", "b"):
        code, out, _ = run(capsys, *draw, "-o", tmp_path / f"{name}.png")
        assert code == 0
        assert f"wrote {tmp_path / name}.png" in out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert size_of(tmp_path / "a.png") == (32, 32)
    run(capsys, *draw[:-3], 4, *draw[-2:], "-o", tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m"])
def test_sample_takes_every_option(demo, tmp_path, capsys, sampler):
    code, _, _ = run(
        capsys, "sample", "a star", "--model", demo / "model", "--negative", "red", "--steps", 3, "--guidance", 2,
        "--sampler", sampler, "--n", 3, "-o", tmp_path / "deep" / "sheet.png",
    )  # fmt: skip
    assert code == 0
    assert size_of(tmp_path / "deep" / "sheet.png")[0] > 300


def test_an_empty_prompt_is_a_prompt(demo, tmp_path, capsys):
    assert run(capsys, "sample", "", "--model", demo / "model", "--steps", 2, "-o", tmp_path / "x.png")[0] == 0


@pytest.mark.filterwarnings("default")  # as outside of tests
def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_cut(demo, tmp_path, capsys):
    prompt = "a small red circle " * 10 + "zebra"
    code, _, err = run(capsys, "sample", prompt, "--model", demo / "model", "--steps", 2, "-o", tmp_path / "x.png")
    assert code == 0
    assert err.startswith("warning: text 0 has ")
    assert "zebra" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def beside(demo, tmp_path_factory):
    """What can go beside a prompt: a photo, a mask of its left half, an adapter and a ControlNet that do something."""
    out, pipe = tmp_path_factory.mktemp("beside"), minildm.load(demo / "model")
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 96, 3), dtype=torch.uint8, generator=g)
    Image.fromarray(pixels.numpy()).resize((192, 128)).save(out / "photo.png")
    for name, color in (("nothing", "black"), ("all", "white")):
        Image.new("L", (64, 64), color).save(out / f"{name}.png")
    mask = Image.new("L", (64, 64), "black")
    mask.paste("white", (0, 0, 32, 64))
    mask.save(out / "mask.png")
    control = ControlNet(pipe.unet, hint_widths=(8, 8, 16))
    for p in (p for p in control.parameters() if not p.any()):  # all that begins at zero, and would say nothing
        torch.nn.init.normal_(p, std=0.3, generator=g)
    write_controlnet(out / "control", control)
    for part, targets in ((pipe.unet, ["to_v", "proj_out", "conv_out"]), (pipe.text, ["to_q", "to_v"])):
        inject(part, rank=2, alpha=2, targets=targets)
        for layer in (module for module in part.modules() if isinstance(module, LoRA)):
            torch.nn.init.normal_(layer.up["default"].weight, std=0.5, generator=g)
    write_lora(out / "lora.safetensors", pipe.unet, pipe.text)
    return out


def test_sample_starts_from_a_picture_and_repaints_what_a_mask_shows(demo, beside, tmp_path, capsys):
    def draw(*options):
        argv = ("sample", "a star", "--model", demo / "model", "--seed", 1, "--steps", 4, "-o", tmp_path / "x.png", *options)
        code, _, err = run(capsys, *argv)
        assert code == 0, err
        return pixels_of(tmp_path / "x.png")

    photo = pixels_of(beside / "photo.png", cut=True)
    restored = minildm.load(demo / "model")
    restored = restored.decode(restored.encode(photo))
    shown = ("--image", beside / "photo.png")
    assert (draw(*shown, "--strength", 0) - restored).abs().max() < 1 / 250
    assert (draw(*shown, "--strength", 1) - draw()).abs().max() < 1 / 250  # from noise alone
    assert (draw(*shown) - draw(*shown, "--strength", 0.8)).abs().max() == 0
    assert (draw(*shown, "--mask", beside / "nothing.png") - restored).abs().max() < 1 / 250
    assert torch.equal(draw(*shown, "--mask", beside / "all.png"), draw(*shown))
    repainted = (draw(*shown, "--mask", beside / "mask.png") - restored).abs()
    assert repainted[..., 24:].mean() < 0.7 * repainted[..., :8].mean()  # away from the edge; the norms of the decoder see all


def test_sample_takes_an_adapter_and_a_controlnet_at_any_scale(demo, beside, tmp_path, capsys):
    def draw(*options):
        argv = ("sample", "a star", "--model", demo / "model", "--seed", 1, "--steps", 2, "-o", tmp_path / "x.png", *options)
        code, _, err = run(capsys, *argv)
        assert code == 0, err
        return (tmp_path / "x.png").read_bytes()

    plain, lora = draw(), ("--lora", beside / "lora.safetensors")
    assert draw(*lora, "--lora-scale", 0) == plain
    assert len({plain, draw(*lora), draw(*lora, "--lora-scale", 0.5)}) == 3
    control = (*lora, "--control", beside / "control", "--hint")  # the adapter wakes the last layer, which begins at zero
    photo, mask = beside / "photo.png", beside / "mask.png"
    assert draw(*control, photo, "--control-scale", 0) == draw(*lora)
    assert len({draw(*lora), draw(*control, photo), draw(*control, photo, "--control-scale", 0.5), draw(*control, mask)}) == 4


def pixels_of(path, cut: bool = False) -> torch.Tensor:
    """A picture file as (1, 3, 32, 32) in [0, 1]; `cut` to its central square and resized."""
    with Image.open(path) as picture:
        if cut:
            side = min(picture.size)
            x, y = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((x, y, x + side, y + side)).resize((32, 32), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


BAD = [
    (["--sampler", "magic"], "choose one of ddim, ddpm, euler, heun, dpmpp_2m"),
    (["--steps", "-3"], r"steps must lie in \[1, 1000\], got -3"),
    (["--n", "0"], "n is 0; ask for at least 1"),
    (["--model", "/nowhere"], "/nowhere"),
    (["-o", "picture.txt"], "ends in .png"),
    (["-o", "/proc/nothing/picture.png"], "/proc/nothing"),
    (["--strength", "0.5"], "--strength goes with --image: give both, or neither"),
    (["--mask", "mask.png"], "--mask goes with --image"),
    (["--control", "control"], "--control goes with --hint"),
    (["--hint", "hint.png"], "--hint goes with --control"),
    (["--lora-scale", "1"], "--lora-scale goes with --lora"),
    (["--image", "/nowhere.png"], r"/nowhere\.png cannot be read as an image"),
    (["--lora", "/nowhere.safetensors"], "/nowhere.safetensors"),
    (["--control", "/nowhere", "--hint", "/nowhere.png"], "/nowhere"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line_and_a_non_zero_exit(demo, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    argv = ["sample", "a star", "--model", demo / "model", "--steps", "2", *options]
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert __import__("re").search(message, err), err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_picture_that_does_not_go_is_named(demo, beside, tmp_path, capsys):
    argv = ["sample", "a star", "--model", demo / "model", "--steps", 2, "-o", tmp_path / "x.png"]
    (beside / "no.png").write_bytes(b"no picture")
    code, _, err = run(capsys, *argv, "--image", beside / "no.png")
    assert (code, "no.png is no readable PNG" in err) == (1, True)
    code, _, err = run(capsys, *argv, "--image", beside / "photo.png", "--strength", 2)
    assert (code, "strength is 2" in err) == (1, True)
    code, _, err = run(capsys, *argv, "--lora", beside / "photo.png")
    assert (code, "photo.png" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_model_is_named(demo, tmp_path, capsys):
    broken = tmp_path / "model"
    shutil.copytree(demo / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = run(capsys, "sample", "a star", "--model", broken, "-o", tmp_path / "x.png")
    assert code == 1
    assert "does not hold a whole minildm model" in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("text", ["{}", "not json", '{"format": "minildm-9"}'])
def test_a_foreign_model_is_named(demo, tmp_path, capsys, text):
    broken = tmp_path / "model"
    shutil.copytree(demo / "model", broken)
    (broken / "model.json").write_text(text)
    code, _, err = run(capsys, "sample", "a star", "--model", broken, "-o", tmp_path / "x.png")
    assert code == 1
    assert "does not hold a whole minildm model" in err


def test_a_model_file_of_another_model_is_named(demo, tmp_path, capsys):
    broken = tmp_path / "model"
    shutil.copytree(demo / "model", broken)
    settings = json.loads((broken / "model.json").read_text())
    settings["unet"]["context_dim"] = 64
    (broken / "model.json").write_text(json.dumps(settings))
    code, _, err = run(capsys, "sample", "a star", "--model", broken, "-o", tmp_path / "x.png")
    assert code == 1
    assert "error: " in err


def test_unknown_dataset_wrong_size_and_unwritable_folder(tmp_path, capsys):
    assert "no dataset and no folder is called 'nothing'" in run(capsys, "train", "nothing", "--out", tmp_path, *BRIEF)[2]
    assert "multiple of 8" in run(capsys, "train", "shapes", "--size", 36, "--out", tmp_path, *BRIEF)[2]
    with pytest.raises(SystemExit) as misused:
        main(["train", "shapes", "--out", str(tmp_path), *BRIEF, "--steps", "0"])
    assert misused.value.code == 2
    assert "at least 1" in capsys.readouterr().err
    code, _, err = run(capsys, "train", "shapes", "--out", "/proc/nothing", *BRIEF)
    assert code == 1
    assert err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_training_on_your_own_folder(tmp_path, capsys):
    folder = tmp_path / "pets"
    folder.mkdir()
    rows = []
    for k, color in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (40, 50), color).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"a {color} sheet"}))
    rows.append(json.dumps({"file_name": "missing.png", "text": "nothing"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    code, out, err = run(capsys, "train", folder, "--out", tmp_path / "out", *BRIEF)
    assert code == 0
    assert "left out 1 of 5" in err
    assert (tmp_path / "out" / "grid.png").exists()
    assert "--model" in out


def test_an_interrupted_run_goes_on_and_another_recipe_is_refused(tmp_path, capsys, monkeypatch):
    from minildm import recipes

    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert main(["train", "shapes", "--out", str(whole), *BRIEF]) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "train_diffusion", stop)
        assert main(["train", "shapes", "--out", str(halved), *BRIEF]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    code, _, err = run(capsys, "train", "shapes", "--out", halved, *BRIEF, "--seed", 1)
    assert code == 1
    assert "unfinished run of another recipe" in err
    assert main(["train", "shapes", "--out", str(halved), *BRIEF]) == 0
    a, b = (minildm.load(folder / "model") for folder in (whole, halved))
    assert all(torch.equal(p, q) for p, q in zip(a.unet.parameters(), b.unet.parameters(), strict=True))


def test_a_loss_that_is_not_a_number_ends_the_run_with_a_reason(tmp_path, capsys, monkeypatch):
    from minildm import train

    monkeypatch.setattr(train, "vae_loss", lambda x, recon, *_, **__: (recon.mean() * float("nan"), {}))
    code, _, err = run(capsys, "train", "shapes", "--out", tmp_path, *BRIEF)
    assert code == 1
    assert "the loss is nan and its gradient nan at step 1 of 3" in err
    assert not (tmp_path / "model").exists()


def test_judge_is_trained_by_the_command_its_file_names(tmp_path, capsys):
    code, out, _ = run(capsys, "judge", "--steps", 2, "--out", tmp_path, "--quiet")
    assert code == 0
    assert "all attributes right on" in out
    assert (tmp_path / "judge-shapes32-objects1.safetensors").exists()


def test_doctor_names_what_is_there_and_what_is_missing(capsys, monkeypatch):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("torch", "python", "device", "threads", "processor", "peak_memory"):
        assert word in out
    monkeypatch.setattr("minildm.data.EMOJI_FONTS", ())

    def nothing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", nothing)
    _, out, _ = run(capsys, "doctor")
    assert "fonts-noto-color-emoji" in out
    assert "pip install 'minildm[class]'" in out


def test_the_module_runs_as_a_program():
    answer = subprocess.run([sys.executable, "-m", "minildm", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"minildm {minildm.__version__}"
    answer = subprocess.run([sys.executable, "-m", "minildm"], capture_output=True, text=True)
    assert answer.returncode == 2


def test_no_warning_reaches_a_plain_run(demo, tmp_path, capsys):
    code, _, err = run(capsys, "sample", "a red star", "--model", demo / "model", "--steps", 2, "-o", tmp_path / "x.png")
    assert (code, err) == (0, "")
