"""What goes wrong around a training: a full disk, a folder that cannot be written, Ctrl-C.  Nothing is lost, and it is said."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minildm import checkpoint
from minildm.__main__ import main
from minildm.checkpoint import held_back, write_atomically
from minildm.train import Fit, fit, step_generator, watch

CFG = Fit(steps=12, lr=1e-2, warmup=3, ema=0.9, save_every=2)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REMEDY = r"make room there, or choose a folder that can be written"


def small_model(width: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, 3, 1))


def run_of(model: nn.Module, folder: Path | None, cfg: Fit = CFG, at: int | None = None, then=lambda: None):
    """The training; at one of its steps something happens, while the step is half done."""

    def loss_at(step: int) -> tuple[torch.Tensor, dict]:
        x = torch.randn(2, 3, 4, 4, generator=step_generator(0, step))
        if step + 1 == at:
            then()
        return (model(x) - x).square().mean(), {}

    return fit(model, loss_at, cfg, folder)


def undisturbed() -> list[torch.Tensor]:
    model = small_model()
    list(run_of(model, None))
    return list(model.parameters())


def ends_as_undisturbed(folder: Path, first: int) -> None:
    """Taken up again, the run begins after the step `first` - 1 and ends with the bits that it would have had."""
    model = small_model()
    assert [p.step for p in run_of(model, folder)] == list(range(first, 13))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed(), strict=True))
    assert checkpoints(folder) == [10, 12]


def checkpoints(folder: Path) -> list[int]:
    """The steps of the whole checkpoints; nothing else may lie there."""
    steps = sorted(int(path.stem[5:]) for path in folder.glob("step-*.json"))
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:07}.{e}" for n in steps for e in ("json", "safetensors")]
    return steps


# ------------------------------------------------------------------------------------------------------------- full disk


def half_written(tensors, path) -> None:
    Path(path).write_bytes(b"half")
    raise FULL


@pytest.mark.parametrize("moment", ["weights", "flush", "rename", "note"])
def test_a_disk_that_is_full_at_any_moment_of_a_write_keeps_what_was_there(tmp_path, monkeypatch, moment):
    def full(*args, **options):
        raise FULL

    def fill_up() -> None:
        if moment == "weights":
            monkeypatch.setattr(checkpoint, "save_file", half_written)
        elif moment == "note":
            monkeypatch.setattr(Path, "write_text", full)
        else:
            monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[moment], full)

    with pytest.raises(OSError, match=rf"cannot write .*No space left on device.*{REMEDY}; started again, the run goes on"):
        list(run_of(small_model(), tmp_path, at=6, then=fill_up))
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [2, 4]
    ends_as_undisturbed(tmp_path, first=5)


def mounted(options: str, folder: Path, code: str) -> dict:
    """What a program prints, as JSON, with a small disk of its own mounted at the folder."""
    folder.mkdir()
    here = Path(__file__).parent
    shell = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, sys.executable, code]
    path = os.pathsep.join([str(here), str(here.parent)])
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def can_mount() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


needs_a_mount = pytest.mark.skipif(not can_mount(), reason="needs to mount a small disk: Linux with user namespaces")

ON_A_FULL_DISK = """
import json, subprocess, torch
from pathlib import Path
from test_failures import run_of, small_model
folder, said = Path({folder!r}), ""
try:
    list(run_of(small_model(3000), folder))
except OSError as error:
    said = str(error)
there = sorted(path.name for path in folder.iterdir())
subprocess.run(["mount", "-o", "remount,size=64m", {folder!r}], check=True)
whole, again = small_model(3000), small_model(3000)
steps = [p.step for p in run_of(again, folder)]
list(run_of(whole, None))
same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
print(json.dumps(dict(said=said, there=there, first=steps[0], same=same)))
"""


@needs_a_mount
def test_on_a_disk_with_room_for_two_checkpoints_the_third_is_refused_and_two_remain(tmp_path):
    disk = tmp_path / "disk"
    answer = mounted("size=900k", disk, ON_A_FULL_DISK.format(folder=str(disk)))
    assert re.search(rf"cannot write {disk}/step-0000006\.safetensors .*No space left on device.*{REMEDY}", answer["said"])
    assert answer["there"] == [f"step-000000{n}.{ending}" for n in (2, 4) for ending in ("json", "safetensors")]
    assert answer["first"] == 5
    assert answer["same"]


# ------------------------------------------------------------------------------------------- folders that cannot be written

READ_ONLY = """
import contextlib, io, json
from minildm.__main__ import main
said = io.StringIO()
with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    codes = [main(["train", "shapes", "--out", {folder!r} + "/out", "--quiet"]),
             main(["sample", "a star", "-o", {folder!r} + "/a.png"])]
print(json.dumps(dict(codes=codes, said=said.getvalue().splitlines())))
"""


@needs_a_mount
def test_a_read_only_disk_is_named_before_any_work_is_done(tmp_path):
    disk = tmp_path / "disk"
    answer = mounted("ro", disk, READ_ONLY.format(folder=str(disk)))
    assert answer["codes"] == [1, 1]
    train, sample = answer["said"]
    assert re.match(rf"error: cannot write {disk}/out/checkpoints/recipe\.json .*Read-only file system.*{REMEDY}$", train)
    assert re.match(rf"error: .*Read-only file system: '{disk}", sample)


def test_a_folder_that_refuses_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "out"))

    def no(*args, **options):
        raise refused

    monkeypatch.setattr(Path, "mkdir", no)
    assert main(["train", "shapes", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert re.match(rf"error: cannot write {tmp_path}/out/\S+ .*Permission denied.*{REMEDY}\n$", said)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/out/a\.json .*File exists.*{REMEDY}"):
        write_atomically(tmp_path / "out" / "a.json", lambda beside: beside.write_text(""))
    assert (tmp_path / "out").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- damaged checkpoints


def test_without_any_whole_checkpoint_a_run_begins_anew_and_says_why(tmp_path, capsys):
    list(run_of(small_model(), tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    model = small_model()
    assert next(run_of(model, tmp_path)).step == 1
    assert capsys.readouterr().out.count("bytes, not") == 2


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("average.0.weight", None), ("average.0.weight", torch.ones(3)), ("average.0.weight", torch.ones(4, 3, 1, 1).int()),
        ("optimizer.0.weight.exp_avg", torch.ones(2)), ("optimizer.0.weight.step", torch.ones(4, 3, 1, 1)),
        ("optimizer.7.weight.step", torch.ones(())), ("odd", torch.ones(1)),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_is_refused_before_anything_is_changed(tmp_path, name, lie):
    list(run_of(small_model(), tmp_path))
    newest = tmp_path / "step-0000012.safetensors"
    tensors = {k: t for k, t in load_file(newest).items() if k != name} | ({} if lie is None else {name: lie})
    save_file(tensors, newest)
    note = newest.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"bytes": newest.stat().st_size}))
    model = small_model()
    with pytest.raises(ValueError, match=rf"another model: 1 tensors differ, {name} first"):
        next(run_of(model, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters(), strict=True))


def test_a_note_without_settings_is_passed_over(tmp_path, capsys):
    list(run_of(small_model(), tmp_path))
    note = tmp_path / "step-0000012.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"settings": [1]}))
    assert [p.step for p in run_of(small_model(), tmp_path)] == [11, 12]
    assert "is damaged (its note is of step 12, with settings [1])" in capsys.readouterr().out


def test_what_nothing_vouches_for_is_cleared_away(tmp_path):
    """A run was killed between a checkpoint and its note, or between the two deletions of an old one."""
    list(run_of(small_model(), tmp_path))
    for step in (1, 14):
        shutil.copy(tmp_path / "step-0000012.safetensors", tmp_path / f"step-{step:07}.safetensors")
    assert list(run_of(small_model(), tmp_path)) == []
    assert checkpoints(tmp_path) == [10, 12]


# ----------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def _ctrl_c():
    """As in a plain Python, whoever started this one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("step", [1, 6, 7, 11])
def test_ctrl_c_in_the_middle_of_a_step_stops_after_it_with_a_checkpoint(tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        watch(run_of(small_model(), tmp_path, at=step, then=press), "", quiet=True)
    assert checkpoints(tmp_path)[-1] == step
    if step == 11:  # so that the last two are not 10 and 12
        assert [p.step for p in run_of(small_model(), tmp_path)] == [12]
        assert checkpoints(tmp_path) == [11, 12]
    else:
        ends_as_undisturbed(tmp_path, first=step + 1)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_pressed_twice_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        watch(run_of(small_model(), tmp_path, at=7, then=lambda: press(2)), "", quiet=True)
    assert checkpoints(tmp_path) == [4, 6]
    ends_as_undisturbed(tmp_path, first=7)


@pytest.mark.usefixtures("_ctrl_c")
def test_where_there_is_no_folder_ctrl_c_only_stops():
    seen = []
    run = run_of(small_model(), None, at=3, then=press)
    with pytest.raises(KeyboardInterrupt):
        watch((seen.append(p) or p for p in run), "", quiet=True)
    assert [p.step for p in seen] == [1, 2, 3]


def test_someone_elses_handler_is_left_alone():
    heard, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with held_back() as pressed:
            press()
        assert (heard, pressed) == ([1], [])
    finally:
        signal.signal(signal.SIGINT, before)
