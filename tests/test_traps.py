"""What real files of published models have, and small ones made for a test have not: averages, leftovers, stale neighbours.

And what no published file should have: lies in headers, names that lead elsewhere, code.
"""

import ast
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minildm
from minildm.convert import open_folder
from minildm.files import open_weights
from minildm.lora import LoRA, inject, remove
from minildm.lora_files import read_lora, write_lora
from minildm.pipeline import Pipeline
from minildm.shapes import Shapes
from minildm.shards import Shards, write_shards
from minildm.tiling import decode_sparingly, decode_tiled
from minildm.unet import UNet, UNetConfig

ROOT = Path(__file__).parent.parent


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


# ------------------------------------------------------------------------------------------------------- headers that lie


def a_safetensors(header: object, body: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int, end: int, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        a_safetensors({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        a_safetensors({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16)),
        a_safetensors({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)),
        a_safetensors({"a": entry(16, 32)}),
        a_safetensors({"a": entry(0, 16)}),
        a_safetensors({"a": entry(0, 64, [16])}),
        a_safetensors({"a": entry(32, 16)}),
        a_safetensors({"a": entry(-16, 0)}),
        a_safetensors({"a": entry(2**63, 2**63 + 16)}),
        a_safetensors({"a": entry(0, 32, [2**32, 2**32])}),
        a_safetensors({"a": entry(0, 32, [-2, -4])}),
        a_safetensors({"a": entry(0, 32, [8.0])}),
        a_safetensors({"a": entry(0, 32, "8")}),
        a_safetensors({"a": entry(0, 32, [4])}),
        a_safetensors({"a": entry(0, 32, [8], "F16")}),
        a_safetensors({"a": entry(0, 32, [8], "Q9")}),
        a_safetensors({"a": {"dtype": "F32", "shape": [8]}}),
        a_safetensors({"a": [0, 32]}),
        a_safetensors([1, 2]),
        a_safetensors(b"not json at all"),
        a_safetensors(b"[" * 100_000),
        a_safetensors(b'{"a": "\xff"}'),
        a_safetensors({"a": entry(0, 32, [8]), "__metadata__": [1]}),
        a_safetensors({"a": entry(0, 32, [8])}, length=2**40),
        a_safetensors({"a": entry(0, 32, [8])}, length=2**64 - 1),
        a_safetensors({"a": entry(0, 32, [8])}, length=0),
        a_safetensors({"a": entry(0, 32, [8])})[:12],
        b"",
    ],
)
def test_safetensors_that_lie_are_refused(tmp_path, data):
    (tmp_path / "odd.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"odd\.safetensors is damaged or no safetensors file"):
        open_weights(tmp_path / "odd.safetensors")


def test_an_index_leads_to_no_file_outside_its_folder(tmp_path):
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    inside = tmp_path / "unet"
    inside.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "a/../../secret.safetensors"):
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
        with pytest.raises(FileNotFoundError, match=r"no file .*unet/secret\.safetensors"):
            open_folder(inside)


# ------------------------------------------------------------------------------------------------------ adapters that lie


@pytest.fixture(scope="module")
def an_adapter(tmp_path_factory) -> tuple[UNet, dict[str, torch.Tensor], str, Path]:
    """A U-Net, the tensors of an adapter for it, the stem of one layer's names, and peft's folder of the same."""
    unet = UNet(UNetConfig(widths=(8, 8), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=8, groups=4))
    inject(unet, 2, 2, ("to_q",))
    folder = tmp_path_factory.mktemp("adapter")
    write_lora(folder / "kohya.safetensors", unet)
    write_lora(folder / "peft", unet, layout="peft")
    remove(unet)
    tensors = load_file(folder / "kohya.safetensors")
    return unet, tensors, next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha"), folder / "peft"


@pytest.mark.parametrize(
    ("factor", "lie"),
    [
        ("alpha", torch.ones(2)), ("alpha", torch.tensor(float("nan"))), ("alpha", torch.tensor(1j)),
        ("lora_down", torch.ones(())), ("lora_down", torch.ones(2)), ("lora_down", torch.ones(0, 8)),
        ("lora_up", torch.ones(8, 0)),
        ("lora_down", torch.ones(2, 8, dtype=torch.int32)), ("lora_up", torch.ones(8, 2, dtype=torch.complex64)),
    ],
)  # fmt: skip
def test_an_adapter_of_odd_numbers_changes_nothing(an_adapter, tmp_path, factor, lie):
    unet, tensors, stem, _ = an_adapter
    name = f"{stem}.alpha" if factor == "alpha" else f"{stem}.{factor}.weight"
    save_file(tensors | {name: lie}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors: .* expected (one finite number|a factor of rank 1)"):
        read_lora(tmp_path / "odd.safetensors", unet)
    assert not any(isinstance(module, LoRA) for module in unet.modules())


@pytest.mark.parametrize(
    "settings",
    [
        "[]", "null", "{", "\x00", "[" * 100_000, '{"lora_alpha": "x"}', '{"lora_alpha": null}', '{"lora_alpha": [1]}',
        '{"lora_alpha": 1e999}', '{"lora_alpha": ' + "9" * 400 + "}", '{"lora_alpha": 1, "alpha_pattern": [1]}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', '{"lora_alpha": 1, "alpha_pattern": {"to_q": "a"}}',
        '{"lora_alpha": 1, "alpha_pattern": {"((.*)*)*x": 1}}', '{"lora_alpha": 1, "alpha_pattern": {"(.|.)(.|.)x": 1}}',
    ],
)  # fmt: skip
def test_settings_that_lie_change_nothing_and_take_no_time(an_adapter, tmp_path, settings):
    unet, _, _, peft = an_adapter
    shutil.copytree(peft, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(settings)
    with (
        in_time(2),
        pytest.raises(ValueError, match=r"the settings of .*adapter_model.* are damaged|expected one finite number"),
    ):
        read_lora(tmp_path / "peft", unet)
    assert not any(isinstance(module, LoRA) for module in unet.modules())


# -------------------------------------------------------------------------------------------------------- shards that lie


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """What hangs is a failure, where there are alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def too_late(*_):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def a_member(name: str, data: bytes, size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header, whose checksum is right whatever size it claims, and data."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    if size is not None:
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header) + data + bytes(-len(data) % 512)


def a_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PAIR = a_member("1.png", a_png()) + a_member("1.txt", b"one")


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_shard_that_sends_its_reader_back_does_not_hold_it_for_ever(tmp_path, size):
    """tarfile follows a negative size backwards, and comes round again."""
    (tmp_path / "x.tar").write_bytes(PAIR + a_member("2.png", b"", size=size) + bytes(1024))
    with in_time(3), pytest.raises(ValueError, match=r"x\.tar is damaged or compressed .*claims"):
        Shards(tmp_path, size=8)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [0, 5, -1, -512, -1024, -(2**40), 2**50])
def test_a_shard_whose_notes_lie_is_named(tmp_path, kind, size):
    (tmp_path / "x.tar").write_bytes(PAIR + a_member("2.png", b"\xff" * 300, size=size, kind=kind))
    said = ""
    with in_time(3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert Shards(tmp_path, size=8).batch([0])[1] == ["one"]
        except ValueError as error:
            said = str(error)
    assert not said or "x.tar is damaged or compressed" in said


def test_a_caption_that_is_no_text_is_named(tmp_path):
    odd = a_member("2.png", a_png()) + a_member("2.json", b'{"text": "\\ud800"}')
    (tmp_path / "x.tar").write_bytes(PAIR + odd + bytes(1024))
    shards = Shards(tmp_path, size=8)
    with pytest.warns(UserWarning, match="picture 1: has no caption"):
        assert shards.batch([1])[1] == ["one"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_that_is_called_like_a_shard_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with in_time(3), pytest.raises(FileNotFoundError, match=r"no \.tar in"):
        Shards(tmp_path, size=8)


def test_shards_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_shards(Shapes(size=16), tmp_path, count=4, per_shard=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = tarfile.TarFile.addfile

    def full(tar, member, *data):
        if member.name == "000000003.png":
            raise OSError("no space left")
        written(tar, member, *data)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="no space left"):
        write_shards(Shapes(size=16, seed=5), tmp_path, count=4, per_shard=2)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() == {"00000.tar", "00001.tar"}
    assert after["00000.tar"] != before["00000.tar"]
    assert after["00001.tar"] == before["00001.tar"]


# ---------------------------------------------------------------------------------------------------- no code, no network

NO_READERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WRITES = {"dumps", "dump", "UnpicklingError"}
UNPACKS = {"extract", "extractall", "unpack_archive"}


def ways_in(source: str) -> list[str]:
    """Where a source reads a pickle, trusts remote code, unpacks an archive or hands words to a shell."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in NO_READERS:
            found += [f"from {node.module} import {a.name}" for a in node.names if a.name not in WRITES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in NO_READERS:
            found += [] if node.attr in WRITES else [f"{node.value.id}.{node.attr}"]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        said = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else k.value for k in node.keywords}
        if called == "torch.load" and said.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if called.startswith(("torch.hub.", "torch.jit.load", "torch.package.")) or called.endswith("read_pickle"):
            found.append(called)
        for name in ("trust_remote_code", "allow_pickle", "shell"):
            if said.get(name, False) is not False:
                found.append(f"{name}={ast.unparse(node)[:40]}")
        if (isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKS) or called in ("os.system", "os.popen"):
            found.append(called)
    return found


def sources() -> dict[str, str]:
    files = [path for folder in ("minildm", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        found[path.name] = "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)
    return found


def test_nothing_here_runs_what_it_reads():
    every = sources()
    assert len(every) > 100
    found = {name: ways for name, source in every.items() if (ways := ways_in(source))}
    # There a test opens its malicious files as a careless program would, to see that they are malicious.
    assert found.pop("tests/test_convert.py") == ["torch.load without weights_only=True", "pickle.loads"]
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "pickle.loads(data)",
        "pickle.Unpickler(f)", "from pickle import load", "marshal.loads(b)", "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)", "torch.hub.load('a', 'b')", "torch.jit.load(f)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "tar.extractall(folder)", "shutil.unpack_archive(f)", "os.system(words)", "subprocess.run(words, shell=True)",
    ],
)  # fmt: skip
def test_every_way_in_is_seen(line):
    assert ways_in(line)
    assert ways_in("torch.load(path, weights_only=True); pickle.dumps(1); np.load(f); subprocess.run(['ls'])") == []


OFFLINE = {"PYTHONPATH": str(ROOT / "tests" / "offline")}


@pytest.mark.parametrize(
    "line",
    [
        "socket.create_connection(('192.0.2.1', 80), 1)", "socket.socket().connect(('192.0.2.1', 80))",
        "socket.gethostbyname('example.org')", "urllib.request.urlopen('http://example.org')",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    ],
)  # fmt: skip
def test_where_chapters_run_nothing_reaches_the_network(line):
    code = f"import socket, urllib.request\ntry:\n    {line}\nexcept OSError:\n    pass"  # who works around a broken line
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ | OFFLINE, capture_output=True, text=True)
    assert answer.returncode
    assert "ReachesOut: this program reaches for the network" in answer.stderr


def test_where_chapters_run_this_machine_can_be_reached():
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); print('here')"
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ | OFFLINE, capture_output=True, text=True, check=True)
    assert answer.stdout == "here\n"


def test_make_test_runs_chapters_so():
    assert 'if "--nbval" in step' in (ROOT / "tests" / "run.py").read_text()
    assert 'Path("tests/offline")' in (ROOT / "tests" / "run.py").read_text()


@pytest.mark.parametrize(
    ("part", "key", "lie"), [("vae", "widths", []), ("unet", "groups", 0), ("unet", "heads", [4, 0]), ("text", "width", "128")]
)
def test_settings_that_no_network_could_have_are_refused_by_name(tmp_path, part, key, lie):
    folder = shutil.copytree(Path(minildm.__file__).parent / "weights" / "shapes32", tmp_path / "model")
    settings = json.loads((folder / "model.json").read_text())
    settings[part][key] = lie
    (folder / "model.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not hold a whole minildm model"):
        minildm.load(folder)
