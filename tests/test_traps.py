"""What real files of published models have, and small ones made for a test have not: averages, leftovers, stale neighbours."""

import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

import minildm
from minildm.files import open_weights
from minildm.pipeline import Pipeline
from minildm.tiling import decode_sparingly, decode_tiled


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """The folder, the single file, and a folder of vocabularies, of a small Stable Diffusion 1."""
    root = tmp_path_factory.mktemp("sd15")
    pipe = reference.pipeline("sd15", root)
    pipe.save_pretrained(root / "folder")
    save_file(reference.single_file("sd15", pipe.components), root / "model.safetensors")
    return root


def test_the_pickles_of_the_first_checkpoints_open_and_run_nothing(tmp_path, monkeypatch):
    """They name a callback of their training program, which is not installed here, and numpy's scalars."""
    ran = []

    class ModelCheckpoint:
        def __init__(self):
            ran.append("made")

        def __setstate__(self, state):
            ran.append("restored")

    ModelCheckpoint.__module__ = name = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = ModelCheckpoint
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        notes = {"callbacks": {ModelCheckpoint: {"best": np.float64(0.5)}}, "state": ModelCheckpoint.__new__(ModelCheckpoint)}
        torch.save({"state_dict": {"a.weight": torch.ones(2)}, "global_step": 470_000, **notes}, tmp_path / "model.ckpt")
    stored = open_weights(tmp_path / "model.ckpt")
    assert stored["a.weight"].read().tolist() == [1, 1]
    assert stored["global_step"].read() == 470_000
    assert ran == []


@pytest.mark.parametrize("content", [b".", b"\x80\x02K\x01K\x02.", pickle.dumps([1, 2]), b"(((((", bytes(range(256))])
def test_odd_pickles_are_damaged_or_empty_never_a_traceback(tmp_path, content):
    (tmp_path / "odd.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|no whole Stable Diffusion"):
        Pipeline.from_compvis(tmp_path / "odd.ckpt")


def test_keys_that_are_no_names_are_passed_over(tmp_path):
    torch.save({"state_dict": {0: torch.ones(1), "huge": 2**70, "w": torch.ones(1)}}, tmp_path / "odd.ckpt")
    assert set(open_weights(tmp_path / "odd.ckpt")) == {"w"}


def test_averaged_weights_are_preferred_as_in_the_published_folder(sd15, tmp_path):
    tensors = load_file(sd15 / "model.safetensors")
    unet = {name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): t for name, t in unet.items()}
    raw = {name: torch.zeros_like(t) for name, t in unet.items()}
    save_file(tensors | raw | averages, tmp_path / "full.safetensors")
    pipe = Pipeline.from_compvis(tmp_path / "full.safetensors", sd15 / "ends", device="cpu")
    wanted = Pipeline.from_diffusers(sd15 / "folder", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), wanted.unet.parameters(), strict=True))


def test_padding_is_the_familys_whatever_the_vocabularys_folder_says(sd15, tmp_path):
    shutil.copytree(sd15 / "ends", tmp_path / "zeros")
    config = json.loads((tmp_path / "zeros" / "tokenizer_config.json").read_text())
    config["pad_token"] = "!"
    (tmp_path / "zeros" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "zeros" / "special_tokens_map.json").unlink(missing_ok=True)
    pipe = Pipeline.from_compvis(sd15 / "model.safetensors", tmp_path / "zeros", device="cpu")
    assert pipe.tokenizer.pad_id == pipe.tokenizer.end_id


def test_a_guess_at_what_a_file_predicts_is_said_and_can_be_overruled(tmp_path):
    pipe = reference.pipeline("sd21", tmp_path)
    save_file(reference.single_file("sd21", pipe.components), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="does not say what it predicts; taken to be v_prediction"):
        minildm.load(tmp_path / "model.safetensors", vocabulary=tmp_path / "ends")
    quiet = minildm.load(tmp_path / "model.safetensors", vocabulary=tmp_path / "ends", prediction_type="epsilon")
    assert quiet.prediction_type == "epsilon"


def test_stale_neighbours_do_not_win_over_what_is_written(sd15, tmp_path):
    pipe = Pipeline.from_diffusers(sd15 / "folder", device="cpu")
    (tmp_path / "unet").mkdir()
    stale = {"weight_map": {"conv_in.weight": "old.safetensors"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(stale))
    pipe.to_diffusers(tmp_path)
    again = Pipeline.from_diffusers(tmp_path, device="cpu")
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.parametrize("write", [Pipeline.save, Pipeline.to_diffusers])
def test_a_write_that_breaks_off_over_an_old_model_leaves_none_that_opens(sd15, tmp_path, monkeypatch, write):
    pipe = Pipeline.from_diffusers(sd15 / "folder", device="cpu")
    write(pipe, tmp_path)
    minildm.load(tmp_path)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(pipe.tokenizer), "save", full)
    with pytest.raises(OSError, match="no space"):
        write(pipe, tmp_path)
    with pytest.raises(FileNotFoundError):
        minildm.load(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["[]", '"text"', "null", '{"text_encoder": null}'])
def test_settings_of_another_form_are_damaged(sd15, tmp_path, name, content):
    shutil.copytree(sd15 / "folder", tmp_path / "folder")
    (tmp_path / "folder" / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)):
        Pipeline.from_diffusers(tmp_path / "folder")


def test_tiles_do_not_overflow_in_half_precision():
    def doubled(z):
        return z[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    z = torch.randn(1, 4, 192, 100).half()
    torch.testing.assert_close(decode_tiled(doubled, z), doubled(z).float(), atol=1e-3, rtol=1e-3)


def test_a_picture_that_is_not_a_number_is_an_error():
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        decode_sparingly(lambda z: z / 0, torch.zeros(1, 4, 8, 8))


def test_sdxls_autoencoder_is_widened_by_every_way_to_float16(tmp_path):
    pipe = reference.pipeline("sdxl", tmp_path)
    pipe.save_pretrained(tmp_path / "folder")
    ours = Pipeline.from_diffusers(tmp_path / "folder", device="cpu")
    ours.save(tmp_path / "own")
    half = Pipeline.load(tmp_path / "own", device="cpu", dtype=torch.float16)
    for pipe in (half, ours.to(torch.float16)):
        assert pipe.unet.conv_in.weight.dtype == torch.float16
        assert pipe.vae.quant_conv.weight.dtype == torch.float32


def test_a_size_beside_latents_is_refused(sd15):
    pipe = Pipeline.from_diffusers(sd15 / "folder", device="cpu")
    with pytest.raises(ValueError, match="latents, image and hint have a size of their own"):
        pipe("a cube", latents=torch.zeros(1, 4, 8, 8), height=64)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_that_lie_about_their_size_cost_no_memory(sd15, tmp_path):
    """A header that promises 2^60 bytes, a tensor that promises 400 GB, and a checkpoint cut in half."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    header = json.dumps({"w": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}).encode()
    whole = (sd15 / "model.safetensors").read_bytes()
    lies = [(2**60).to_bytes(8, "little") + b"{}", len(header).to_bytes(8, "little") + header, whole[: len(whole) // 2]]
    before = peak()
    for n, lie in enumerate(lies):
        (tmp_path / f"{n}.safetensors").write_bytes(lie)
        with pytest.raises(ValueError, match="damaged"):
            Pipeline.from_compvis(tmp_path / f"{n}.safetensors", sd15 / "ends")
    assert peak() - before < 32 * 2**20
