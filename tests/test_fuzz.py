"""Generated inputs: whatever comes in, the answer has its properties, or the error is one that says what to do.

`make test` tries some hundreds of each; `MINILDM_FUZZ=10000 pytest tests/test_fuzz.py` tries as many of each as you ask for,
and prints how many there were.
"""

import io
import json
import os
import struct
import tarfile
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from minildm.adapters import read_controlnet, write_controlnet
from minildm.checkpoint import resume, save_checkpoint
from minildm.clip import TextConfig, TextEncoder
from minildm.controlnet import ControlNet
from minildm.files import open_weights
from minildm.flow import FlowPath, flow_euler
from minildm.folder import ImageFolder
from minildm.guidance import guided
from minildm.lora import LoRA, inject, remove
from minildm.lora_files import read_lora, write_lora
from minildm.metrics import caption_accuracy
from minildm.samplers import SAMPLERS
from minildm.schedule import PREDICTION_TYPES, SPACINGS, NoiseSchedule
from minildm.scores import frechet_distance, inception_score, kid, precision_recall
from minildm.shapes import COLORS, SHAPES, Shapes, from_one_side
from minildm.shards import Shards
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig

COUNT = int(os.environ.get("MINILDM_FUZZ", "200"))
TRIED = Counter()
# The same inputs on every run, so that a red test stays red; a longer run goes further along the same row.
FUZZ = settings(
    max_examples=COUNT, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(autouse=True)
def counted(request):
    yield
    if "MINILDM_FUZZ" in os.environ:
        print(f"\n{request.node.name}: {TRIED[request.node.name]} inputs, {sum(TRIED.values())} in all")


def outcome(function):
    """What a function returns, and None; or None, and what its ValueError says.  Any other error is one too many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(), None
        except ValueError as error:
            return None, str(error)


def tried(name: str) -> None:
    TRIED[name] += 1


# ------------------------------------------------------------------------------------------------------------- tokenizer

TOKENIZER = Tokenizer.train(["a red circle", "two blue squares on white", "naïve café 北京 🙂"], 300, context_length=24)


@FUZZ
@given(st.text(max_size=60))
def test_every_text_comes_back(text):
    tried("test_every_text_comes_back")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = TOKENIZER(text)
    assert row.shape == (1, 24)
    assert row[0, 0] == TOKENIZER.start_id
    assert (row == TOKENIZER.end_id).any()
    assert row.min() >= 0
    assert row.max() < TOKENIZER.vocab_size


@FUZZ
@given(st.lists(st.integers(-5, 320), max_size=30))
def test_every_row_of_ids_is_a_text_or_refused(ids):
    tried("test_every_row_of_ids_is_a_text_or_refused")
    if all(0 <= i < TOKENIZER.vocab_size for i in ids):
        assert isinstance(TOKENIZER.decode(ids), str)
    else:
        with pytest.raises(ValueError, match="is outside"):
            TOKENIZER.decode(ids)


# ------------------------------------------------------------------------------------------------- schedules and samplers

betas = st.tuples(st.floats(1e-5, 0.02), st.floats(1e-5, 0.2)).map(sorted)
schedules = st.builds(
    lambda kind, T, ends, zero: (lambda s: s.zero_terminal_snr() if zero and T > 1 else s)(
        NoiseSchedule.cosine(T) if kind == "cosine" else getattr(NoiseSchedule, kind)(T, *ends)
    ),
    st.sampled_from(["scaled_linear", "linear", "cosine"]), st.integers(1, 400), betas, st.booleans(),
)  # fmt: skip


@FUZZ
@given(schedules, st.sampled_from(PREDICTION_TYPES), st.integers(0, 2**31), st.floats(0, 1))
def test_predictions_turn_into_each_other(schedule, kind, seed, where):
    tried("test_predictions_turn_into_each_other")
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.full((3,), round(where * (schedule.T - 1)))
    x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t, kind)
    a = schedule.alpha_bar[t[0]].item()
    if a > 1e-6:
        torch.testing.assert_close(schedule.to_x0(target, x, t, kind), x0, atol=1e-6, rtol=1e-6)
    elif kind == "epsilon" and a == 0:
        with pytest.raises(ValueError, match="zero terminal SNR"):
            schedule.to_x0(target, x, t, kind)
    if 1 - a > 1e-6:
        torch.testing.assert_close(schedule.to_epsilon(target, x, t, kind), noise, atol=1e-6, rtol=1e-6)


@FUZZ
@given(st.integers(1, 1200), st.integers(-3, 1300), st.sampled_from(SPACINGS))
def test_timesteps_fall_and_stay_inside(T, steps, spacing):
    tried("test_timesteps_fall_and_stay_inside")
    schedule = NoiseSchedule.cosine(T)
    if not 1 <= steps <= T:
        with pytest.raises(ValueError, match="steps must lie in"):
            schedule.timesteps(steps, spacing)
        return
    visited = schedule.timesteps(steps, spacing)
    assert len(visited) == steps
    assert 0 <= visited[-1] <= visited[0] < T
    assert visited == sorted(set(visited), reverse=True)
    assert spacing == "leading" or visited[0] == T - 1


@FUZZ
@given(
    schedules, st.sampled_from(sorted(SAMPLERS)), st.integers(1, 12), st.sampled_from(SPACINGS),
    st.sampled_from(PREDICTION_TYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_a_model_that_knows_the_answer_is_believed(schedule, sampler, steps, spacing, kind, seed):
    """Whatever the sampler and its strides, a model that always means one x0 leads there."""
    tried("test_a_model_that_knows_the_answer_is_believed")
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 1, 2, 2, generator=generator, dtype=torch.float64)

    def model(x, t):
        a = schedule.alpha_bar[t[0]]
        return schedule.target(x0, (x - a.sqrt() * x0) / (1 - a).sqrt(), t, kind)

    def draw():
        return SAMPLERS[sampler](
            model, noise, schedule, steps=steps, spacing=spacing, prediction_type=kind, generator=generator
        )  # fmt: skip

    if steps > schedule.T:
        with pytest.raises(ValueError, match="steps must lie in"):
            draw()
    elif kind == "epsilon" and schedule.alpha_bar[schedule.timesteps(steps, spacing)[0]] == 0:
        with pytest.raises(ValueError, match="pure noise"):
            draw()
    else:
        # ddim stops at the first noise level, with this much of what it took to be noise at the start
        a_0, a_start = schedule.alpha_bar[[0, schedule.timesteps(steps, spacing)[0]]].tolist()
        left = ((1 - a_0) / (1 - a_start)) ** 0.5 if sampler == "ddim" else 0
        floor = 2**-12 if schedule.alpha_bar[-1] == 0 else 0  # what stands for no picture at all where sigma would be infinite
        assert (draw() - x0).abs().max() <= (1.01 * left + floor) * (noise.abs().max() + 2 * x0.abs().max()) + 1e-4


@FUZZ
@given(st.floats(0.1, 12), st.integers(1, 30), st.integers(0, 2**31), st.integers(1, 3))
def test_a_straight_path_is_walked_to_its_end(shift, steps, seed, batch):
    tried("test_a_straight_path_is_walked_to_its_end")
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, batch, 1, 2, 2, generator=generator, dtype=torch.float64)
    path = FlowPath(shift=shift)
    t = path.draw(64, generator)
    assert ((t > 0) & (t < 1000)).all()
    torch.testing.assert_close(flow_euler(lambda x, t: noise - x0, noise, path, steps), x0)
    times = path.times(steps)
    assert times == sorted(set(times), reverse=True)
    assert times[0] == pytest.approx(1000)


@FUZZ
@given(st.floats(-5, 20), st.floats(0, 1), st.integers(1, 4), st.integers(0, 2**31))
def test_guidance_is_linear_and_batches_do_not_matter(scale, rescale, batch, seed):
    tried("test_guidance_is_linear_and_batches_do_not_matter")
    generator = torch.Generator().manual_seed(seed)
    x, cond, uncond = torch.randn(3, batch, 1, 2, 2, generator=generator, dtype=torch.float64)

    def model(x, t, context):
        return x * 0.5 + context

    t = torch.zeros(batch, dtype=torch.int64)
    both = guided(model, {"context": cond}, {"context": uncond}, scale=scale, rescale=rescale)(x, t)
    if not rescale:
        torch.testing.assert_close(both, 0.5 * x + uncond + scale * (cond - uncond))
    each = [
        guided(model, {"context": cond[[i]]}, {"context": uncond[[i]]}, scale=scale, rescale=rescale)(x[[i]], t[[i]])
        for i in range(batch)
    ]
    torch.testing.assert_close(both, torch.cat(each))


# --------------------------------------------------------------------------------------------------------------- metrics


@FUZZ
@given(st.integers(8, 40), st.integers(8, 40), st.integers(1, 6), st.floats(-3, 3), st.floats(0.01, 30), st.integers(0, 2**31))
def test_scores_stay_within_their_bounds(n, m, dims, shift, spread, seed):
    tried("test_scores_stay_within_their_bounds")
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, dims, generator=generator, dtype=torch.float64)
    fake = shift + spread * torch.randn(m, dims, generator=generator, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples
        there, back, itself = frechet_distance(real, fake), frechet_distance(fake, real), frechet_distance(real, real)
        mean, _ = kid(real, fake, subsets=3, subset_size=6, generator=generator)
    assert there >= -1e-6
    assert there == pytest.approx(back, rel=1e-4, abs=1e-6)
    assert itself == pytest.approx(0, abs=1e-5)
    assert np.isfinite(mean)
    precision, recall = precision_recall(real, fake, k=3)
    assert 0 <= precision <= 1
    assert 0 <= recall <= 1
    score, _ = inception_score(fake, splits=2)
    assert 1 - 1e-6 <= score <= dims + 1e-6


@FUZZ
@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(1, 2), st.floats(0, 1))
def test_pictures_read_as_they_are_drawn_are_all_right(count, seed, objects, partial):
    tried("test_pictures_read_as_they_are_drawn_are_all_right")
    shapes = Shapes(size=16, objects=objects, seed=seed, partial=partial)
    drawn = shapes.draw(range(seed % 1000, seed % 1000 + count))
    assert drawn.images.min() >= -1
    assert drawn.images.max() <= 1
    as_read = from_one_side(drawn.attributes)[0]
    accuracy = caption_accuracy(as_read, drawn.attributes, drawn.mentioned)
    assert accuracy.all_correct == 1
    low, high = accuracy.interval
    assert 0 <= low <= high <= 1
    for caption, row, mentioned in zip(drawn.captions, drawn.attributes, drawn.mentioned, strict=True):
        said = set(caption.replace(",", "").split())
        for names, columns in ((tuple(COLORS), (2, 6)), (SHAPES, (3, 7))):
            named = {names[row[k]] for k in columns if mentioned[k]}
            assert said & {*names} == named


# ----------------------------------------------------------------------------------------------------- pictures and files


def a_picture(mode: str, size: tuple[int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    **{f"png {mode}": a_picture(mode, (9, 5), "PNG") for mode in ("1", "L", "LA", "RGB", "RGBA", "P", "I;16")},
    "jpeg": a_picture("RGB", (20, 30), "JPEG"), "gif": a_picture("P", (8, 8), "GIF"), "webp": a_picture("RGBA", (8, 6), "WEBP"),
    "bmp": a_picture("RGB", (7, 3), "BMP"), "tiff": a_picture("F", (5, 5), "TIFF"), "ppm": a_picture("RGB", (4, 4), "PPM"),
}  # fmt: skip
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from(["set", "cut", "insert", "double"])), max_size=6
)


def damaged(data: bytes, changes: list[tuple[float, int, str]]) -> bytes:
    """The bytes with some set, cut off, put in or doubled."""
    data = bytearray(data)
    for where, value, kind in changes:
        at = int(where * max(0, len(data) - 1))
        if kind == "set" and data:
            data[at] = value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "insert":
            data[at:at] = bytes([value]) * 3
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


@FUZZ
@given(st.sampled_from(sorted(PICTURES)), edits)
def test_a_damaged_picture_is_read_or_named(tmp_path_factory, kind, changes):
    tried("test_a_damaged_picture_is_read_or_named")
    folder = tmp_path_factory.getbasetemp() / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "good.png").write_bytes(PICTURES["png RGB"])
    (folder / "odd.png").write_bytes(damaged(PICTURES[kind], changes))
    rows = [{"file_name": name, "text": "a thing"} for name in ("good.png", "odd.png")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ImageFolder(folder, size=8)
    assert len(found) + len(found.problems) == 2
    assert found.batch(range(len(found)))[0].shape == (len(found), 3, 8, 8)


@FUZZ
@given(st.lists(st.one_of(
    st.binary(max_size=30),
    st.fixed_dictionaries({"file_name": st.text(max_size=12), "text": st.text(max_size=8)}).map(
        lambda row: json.dumps(row).encode()
    ),
    st.sampled_from(["../secret.png", "/etc/passwd", "link.png", "a/../../secret.png", "good.png", "\x00", "C:\\x.png"]).map(
        lambda name: json.dumps({"file_name": name, "text": "t"}).encode()
    ),
), max_size=5))  # fmt: skip
def test_metadata_leads_nowhere_else(tmp_path_factory, lines):
    tried("test_metadata_leads_nowhere_else")
    base = tmp_path_factory.getbasetemp() / "metadata"
    folder = base / "inside"
    folder.mkdir(exist_ok=True, parents=True)
    (base / "secret.png").write_bytes(a_picture("L", (8, 8), "PNG"))
    (folder / "good.png").write_bytes(PICTURES["png RGB"])
    good_pixels = torch.tensor([1, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    if not (folder / "link.png").is_symlink():
        (folder / "link.png").symlink_to(base / "secret.png")
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    found, said = outcome(lambda: ImageFolder(folder, size=4))
    if found is None:
        assert "metadata.jsonl" in said
    else:
        assert len(found) <= sum(b"good.png" in line for line in lines)
        assert torch.equal(found.pixels, good_pixels.expand_as(found.pixels))  # the secret has another colour


def a_safetensors(folder: Path) -> bytes:
    path = folder / "whole.safetensors"
    save_file({"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4)}, path)
    return path.read_bytes()


@FUZZ
@given(edits, st.sampled_from(["safetensors", "ckpt"]), st.one_of(st.none(), st.integers(0, 2**63)))
def test_a_damaged_file_of_weights_is_opened_or_named(tmp_path_factory, changes, suffix, length):
    """Headers that lie, lengths that lie, pickles cut anywhere: a ValueError, or tensors; nothing is run."""
    tried("test_a_damaged_file_of_weights_is_opened_or_named")
    folder = tmp_path_factory.getbasetemp() / "weights"
    folder.mkdir(exist_ok=True)
    path = folder / f"odd.{suffix}"
    if suffix == "safetensors":
        data = a_safetensors(folder)
    else:
        buffer = io.BytesIO()
        torch.save({"state_dict": {"a": torch.ones(3)}}, buffer)
        data = buffer.getvalue()
    data = damaged(data, changes)
    if length is not None and suffix == "safetensors":
        data = struct.pack("<Q", length) + data[8:]
    path.write_bytes(data)

    def opened():
        return [(stored.shape, tuple(stored.read().shape)) for stored in open_weights(path).values()]

    shapes, said = outcome(opened)
    if shapes is None:
        assert str(path) in said
    else:
        assert all(promised == read for promised, read in shapes)


@FUZZ
@given(edits, edits)
def test_a_damaged_checkpoint_is_passed_over(tmp_path_factory, changes, note_changes):
    tried("test_a_damaged_checkpoint_is_passed_over")
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in (1, 2):
        save_checkpoint(folder, step, {"lr": 1}, model, average, optimizer)
    newest = folder / "step-0000002.safetensors"
    newest.write_bytes(damaged(newest.read_bytes(), changes))
    note = newest.with_suffix(".json")
    note.write_bytes(damaged(note.read_bytes(), note_changes))
    step, said = outcome(lambda: resume(folder, {"lr": 1}, model, average, optimizer))
    if changes or note_changes:  # whole notes of other settings, and whole tensors of another model, are refused
        assert step in (1, 2) or "another" in said
    else:
        assert step == 2


# ------------------------------------------------------------------------------------------------------- headers that lie

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "C64", "I64", "I8", "U16", "BOOL", "Q9", "", 3, None)
numbers = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**32 + 1, 2**60, 2**63 - 1, 2**64, -(2**63)]))
names_of_tensors = st.one_of(
    st.text(max_size=8), st.sampled_from([".alpha", ".lora_down.weight", "lora_unet_", "input_hint_block.x.weight"])
)
plain_json = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
lies = st.lists(
    st.one_of(
        st.tuples(st.just("dtype"), st.floats(0, 1), st.sampled_from(DTYPES)),
        st.tuples(st.just("shape"), st.floats(0, 1), st.one_of(st.lists(numbers, max_size=4), plain_json)),
        st.tuples(st.just("data_offsets"), st.floats(0, 1), st.one_of(st.lists(numbers, min_size=2, max_size=2), plain_json)),
        st.tuples(st.just("turned"), st.floats(0, 1), st.none()),  # the shape's numbers in another order: as many bytes
        st.tuples(st.just("renamed"), st.floats(0, 1), names_of_tensors),
        st.tuples(st.just("digit"), st.floats(0, 1), st.sampled_from("0123456789")),
        st.tuples(st.just("gone"), st.floats(0, 1), st.none()),
        st.tuples(st.just("note"), st.floats(0, 1), plain_json),
    ),
    max_size=3,
)


def with_lies(data: bytes, told: list[tuple]) -> bytes:
    """A safetensors file whose header says something else of the same bytes; its length is right."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for kind, where, value in told:
        names = [name for name in header if name != "__metadata__"]
        if not names:
            continue
        name = names[int(where * (len(names) - 1))]
        entry = header[name]
        if kind == "turned":
            entry["shape"] = [*reversed(entry["shape"])] if isinstance(entry["shape"], list) else [1]
        elif kind in ("renamed", "digit"):
            other = value if kind == "renamed" else "".join(value if c.isdigit() else c for c in name)
            header[other] = header.pop(name)
        elif kind == "gone":
            del header[name]
        elif kind == "note":
            header["__metadata__"] = {"lora_adapter_metadata": json.dumps(value)}
        else:
            entry[kind] = value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@FUZZ
@given(lies)
def test_a_header_that_lies_is_refused_or_kept_to(tmp_path_factory, told):
    tried("test_a_header_that_lies_is_refused_or_kept_to")
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    path = folder / "odd.safetensors"
    path.write_bytes(with_lies(a_safetensors(folder), told))

    def opened():
        return [(stored.shape, stored.read()) for stored in open_weights(path).values()]

    read, said = outcome(opened)
    if read is None:
        assert str(path) in said
    else:
        assert all(promised == tuple(tensor.shape) for promised, tensor in read)
        assert sum(tensor.nbytes for _, tensor in read) <= path.stat().st_size


# -------------------------------------------------------------------------------------------- adapters and ControlNets

SMALL = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=12, pooled_dim=None, groups=4)


def networks() -> tuple[UNet, TextEncoder]:
    torch.manual_seed(0)
    return UNet(SMALL), TextEncoder(TextConfig(vocab_size=20, context_length=8, width=8, layers=1, heads=1))


@cache
def adapted(folder: Path) -> tuple[UNet, TextEncoder, dict, dict]:
    """Two networks, what is in them, and an adapter for them in each layout, as {its file: bytes}."""
    folder.mkdir()
    unet, text = networks()
    inject(unet, 2, 3, ("to_q", "conv1"))
    inject(text, 2, 3, ("fc1",) if any("fc1" in name for name, _ in text.named_modules()) else ("in_proj.q",))
    write_lora(folder / "kohya.safetensors", unet, text)
    write_lora(folder / "pytorch_lora_weights.safetensors", unet, text, layout="diffusers")
    write_lora(folder, unet, layout="peft")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    layouts = {
        "kohya": {"kohya.safetensors": files["kohya.safetensors"]},
        "diffusers": {"pytorch_lora_weights.safetensors": files["pytorch_lora_weights.safetensors"]},
        "peft": {name: files[name] for name in ("adapter_model.safetensors", "adapter_config.json")},
    }
    unet, text = networks()
    return unet, text, {name: t.clone() for net in (unet, text) for name, t in net.state_dict().items()}, layouts


settings_of_peft = st.one_of(
    st.just(None),
    st.binary(max_size=8),
    plain_json.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            "lora_alpha": plain_json,
            "use_rslora": plain_json,
            "alpha_pattern": st.one_of(
                plain_json, st.dictionaries(st.sampled_from(["to_q", "^down.*$", "(", "(a+)+b", "[", "(.*)*x"]), numbers)
            ),
        },
    ).map(lambda value: json.dumps(value).encode()),
)


@FUZZ
@given(st.sampled_from(["kohya", "diffusers", "peft"]), lies, edits, settings_of_peft)
def test_an_adapter_is_read_whole_or_refused_whole(tmp_path_factory, layout, told, changes, settings):
    tried("test_an_adapter_is_read_whole_or_refused_whole")
    unet, text, before, layouts = adapted(tmp_path_factory.getbasetemp() / "adapters")
    folder = tmp_path_factory.getbasetemp() / f"odd {layout}"
    folder.mkdir(exist_ok=True)
    for name, data in layouts[layout].items():
        if name.endswith(".json"):
            data = data if settings is None else settings
        else:
            data = damaged(with_lies(data, told), changes if len(told) < 2 else [])
        (folder / name).write_bytes(data)
    path = folder / "kohya.safetensors" if layout == "kohya" else folder
    found, said = outcome(lambda: read_lora(path, unet, text))
    wrapped = {name for net in (unet, text) for name, module in net.named_modules() if isinstance(module, LoRA)}
    if found is None:
        assert said
        assert not wrapped
    else:
        assert wrapped == {layer for layers in found.values() for layer in layers} != set()
        for net in (unet, text):
            loras = [module for module in net.modules() if isinstance(module, LoRA)]
            assert all(np.isfinite(lora.alpha["default"]) for lora in loras)
            if loras:
                remove(net)
    for net in (unet, text):
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@cache
def control(folder: Path) -> dict[str, bytes]:
    """A ControlNet of which a single file can tell the shape, in both layouts, as {file: bytes}."""
    folder.mkdir()
    torch.manual_seed(0)
    one = ControlNet(UNet(UNetConfig(widths=(32,), depths=(1,), heads=(8,), context_dim=8, pooled_dim=None)), (4, 8))
    write_controlnet(folder / "one.safetensors", one)
    write_controlnet(folder, one)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(FUZZ, max_examples=max(1, COUNT // 4))  # a network is built for each
@given(
    st.booleans(), lies, edits, st.lists(st.tuples(st.floats(0, 1), st.one_of(numbers.filter(lambda n: n < 99), plain_json)))
)
def test_a_controlnet_is_read_whole_or_refused(tmp_path_factory, single, told, changes, fields):
    tried("test_a_controlnet_is_read_whole_or_refused")
    folder, good = tmp_path_factory.getbasetemp() / "odd control", control(tmp_path_factory.getbasetemp() / "control")
    folder.mkdir(exist_ok=True)
    name = "one.safetensors" if single else "diffusion_pytorch_model.safetensors"
    (folder / name).write_bytes(damaged(with_lies(good[name], told), changes if len(told) < 2 else []))
    config = json.loads(good["config.json"])
    for where, value in fields:
        config[sorted(config)[int(where * (len(config) - 1))]] = value
    (folder / "config.json").write_text(json.dumps(config))
    found, said = outcome(lambda: read_controlnet(folder / name if single else folder, device="cpu"))
    if found is None:
        assert said
    else:
        assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in found.parameters())


# ------------------------------------------------------------------------------------------------------------------ shards


def a_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("1.png", PICTURES["png RGB"]), ("1.txt", b"one"), ("2.jpg", PICTURES["jpeg"])):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "x"} if name == "1.txt" else {}
            tar.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("2.json")
        member.size = len(b'{"text": "two"}')
        tar.addfile(member, io.BytesIO(b'{"text": "two"}'))
    return buffer.getvalue()


TAR = a_tar()
HEADERS = [at for at in range(0, len(TAR), 512) if TAR[at + 257 : at + 262] == b"ustar"]
FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "link": (157, 257), "prefix": (345, 500)}
sizes = st.one_of(st.integers(-(2**40), 2**40), st.integers(-2000, 2000), st.sampled_from([-512, -1024, 2**62, -(2**62)]))


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, len(HEADERS) - 1), st.one_of(
        st.tuples(st.just("size"), sizes.map(lambda n: tarfile.itn(n, 12, tarfile.GNU_FORMAT))),
        st.tuples(st.just("type"), st.sampled_from([bytes([c]) for c in b"01234567LKSDxgXV\0"])),
        st.tuples(st.sampled_from(["name", "link", "prefix"]), st.sampled_from(
            [b"../../secret.png", b"/etc/passwd", b"1.png", b"", b"\xff\xfe", b"2.txt", b"a" * 100]
        )),
    )), max_size=3),
    edits,
)  # fmt: skip
def test_a_shard_that_lies_is_read_or_named(tmp_path_factory, told, changes):
    """Its headers' checksums are right, so that what they say is listened to."""
    tried("test_a_shard_that_lies_is_read_or_named")
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    data = bytearray(TAR)
    for header, (field, value) in told:
        at, (start, end) = HEADERS[header], FIELDS[field]
        data[at + start : at + end] = value[: end - start].ljust(end - start, b"\0")
        data[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[at : at + 512]))[0]
    (folder / "x.tar").write_bytes(damaged(bytes(data), changes if not told else []))
    found, said = outcome(lambda: Shards(folder, size=8))
    if found is None:
        assert str(folder) in said
        return
    assert 1 <= len(found) <= 4
    read, said = outcome(lambda: found.batch(range(len(found))))
    if read is None:
        assert "cannot be read" in said
    else:
        assert read[0].shape == (len(found), 3, 8, 8)
        assert set(read[1]) <= {"one", "two"} or changes or told
    assert [path.name for path in folder.iterdir()] == ["x.tar"]
