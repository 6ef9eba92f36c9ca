"""The datasets: what comes out of each, and what each says when something is wrong."""

import hashlib
import json
import pickle
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from minildm import data
from minildm.data import Emoji, ImageFolder, Pictures, find_emoji_font, open_dataset, torchvision_set

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def assert_is_dataset(ds: Pictures, size: int) -> None:
    assert ds.size == size
    assert isinstance(ds.name, str)
    image, caption = ds[0]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert image.min() >= -1
    assert image.max() <= 1
    assert isinstance(caption, str)
    images, captions = ds.batch([len(ds) - 1, 0])
    assert images.shape == (2, 3, size, size)
    torch.testing.assert_close(images[1], image, rtol=0, atol=0)
    assert captions == [ds[len(ds) - 1][1], caption]


def color(ds: Pictures, index: int, y: int, x: int) -> tuple[int, ...]:
    """One pixel of one picture, back in [0, 255]."""
    return tuple(((ds[index][0][:, y, x] + 1) * 127.5).round().int().tolist())


# ---- Pictures


def test_pictures_reach_both_ends_of_the_range_and_index_like_a_list():
    pixels = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 255.0), torch.full((3, 2, 2), 51.0)]).byte()
    ds = Pictures(name="grays", pixels=pixels, captions=["black", "white", "dark"])
    assert ds[0][0].unique().tolist() == [-1.0]
    assert ds[1][0].unique().tolist() == [1.0]
    assert [caption for _, caption in ds] == ["black", "white", "dark"]  # iteration ends, by IndexError
    images, captions = ds.batch(torch.tensor([2, 1, 2]))
    assert captions == ["dark", "white", "dark"]
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([-0.6, 1.0, -0.6]))
    assert ds.batch(range(3))[0].shape == (3, 3, 2, 2)
    assert ds.batch([])[0].shape == (0, 3, 2, 2)
    with pytest.raises(IndexError):
        ds.batch([3])


def test_pictures_refuse_what_does_not_fit_together():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        Pictures(name="x", pixels=pixels, captions=["one"])
    with pytest.raises(ValueError, match="0 pictures"):
        Pictures(name="x", pixels=pixels[:0], captions=[])
    with pytest.raises(ValueError, match="uint8"):
        Pictures(name="x", pixels=pixels.float(), captions=["one", "two"])
    with pytest.raises(ValueError, match="size, size"):
        Pictures(name="x", pixels=pixels[..., :3], captions=["one", "two"])


# ---- Emoji


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    try:
        find_emoji_font()
    except FileNotFoundError as error:
        pytest.skip(f"needs a colour emoji font: {error}")
    return Emoji(size=32)


@pytest.fixture
def tiny_font(tmp_path: Path) -> Path:
    """A colour font of seven squares: three that are pictures, four that are not."""
    builder_module = pytest.importorskip("fontTools.fontBuilder", reason="fontTools comes with matplotlib")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def square(side: int):
        pen = pens.TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, side), (side, side), (side, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = {
        0x23: "hash",  # a keycap base
        0xA9: "copyright",  # an outline without colour
        0x2B1C: "square",  # small and white
        0x2B50: "star",  # "white medium star", yellow
        0x1F1E6: "flag",  # a regional indicator
        0x1F3FB: "tone",  # a skin tone
        0x1F431: "cat",
    }
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values(), "big", "small"])
    builder.setupCharacterMap(names)
    big, small = square(1000), square(500)
    outlines = dict.fromkeys([*names.values(), "big"], big) | {"small": small, "square": small, ".notdef": square(0)}
    builder.setupGlyf(outlines)
    builder.setupHorizontalMetrics(dict.fromkeys(outlines, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    red, yellow, white = 0, 1, 2
    colored = {name: [("big", red)] for name in ("hash", "flag", "tone", "cat")}
    builder.setupCOLR(colored | {"star": [("big", yellow)], "square": [("small", white)]})
    builder.setupCPAL([[(1.0, 0.0, 0.0, 1.0), (1.0, 0.8, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0)]])
    path = tmp_path / "tiny.ttf"
    builder.save(path)
    return path


def test_emoji_takes_colour_glyphs_that_are_pictures_and_no_others(tiny_font: Path):
    ds = Emoji(size=16, font=tiny_font, background=(0, 0, 255))
    assert_is_dataset(ds, size=16)
    assert ds.codepoints == [0x2B1C, 0x2B50, 0x1F431]
    assert ds.captions == ["white large square", "medium star", "cat face"]  # a yellow star is not called white
    assert color(ds, 2, 8, 8) == RED
    assert color(ds, 2, 1, 1) == RED  # the largest glyph fills the picture
    assert color(ds, 0, 8, 8) == WHITE  # half its size, in the middle, background around it
    for corner in ((1, 1), (1, 14), (14, 1), (14, 14)):
        assert color(ds, 0, *corner) == BLUE


def test_emoji_without_a_font_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(data, "EMOJI_FONTS", (str(tmp_path / "none.ttf"),))
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        Emoji()
    with pytest.raises(FileNotFoundError, match=r"no font file at .*mine\.ttf.*apt-get install"):
        Emoji(font=tmp_path / "mine.ttf")
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        open_dataset("emoji", size=32)


def test_emoji_font_is_found_at_the_usual_places(monkeypatch: pytest.MonkeyPatch, tiny_font: Path):
    monkeypatch.setattr(data, "EMOJI_FONTS", ("/nowhere/x.ttf", str(tiny_font)))
    assert Emoji(size=8).font == tiny_font
    monkeypatch.setenv("HOME", str(tiny_font.parent))
    assert find_emoji_font(f"~/{tiny_font.name}") == tiny_font


def test_emoji_with_an_unfit_font_says_so(tmp_path: Path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font at all")
    with pytest.raises(ValueError, match="cannot be used as a font"):
        Emoji(font=broken)
    matplotlib = pytest.importorskip("matplotlib")
    plain = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(ValueError, match="no colour emoji"):
        Emoji(font=plain)


@pytest.mark.parametrize("size", [0, -4])
def test_a_size_that_is_no_size_is_refused(size: int, tmp_path: Path):
    for make in (
        lambda: Emoji(size=size),
        lambda: ImageFolder(tmp_path, size=size),
        lambda: torchvision_set("mnist", size=size),
    ):
        with pytest.raises(ValueError, match=f"size is {size}"):
            make()


@pytest.mark.parametrize(
    ("name", "colorfulness", "caption"),
    [
        ("grinning face", 190, "grinning face"),
        ("heavy black heart", 180, "red heart"),
        ("black heart", 0, "black heart"),
        ("white smiling face", 187, "smiling face"),
        ("leftwards black arrow", 46, "leftwards arrow"),
        ("womans hat", 100, "woman's hat"),
        ("mens symbol", 100, "men's symbol"),
        ("clock face one oclock", 30, "clock face one o'clock"),
        ("lower left crayon", 200, "crayon"),
        ("up-pointing small red triangle", 200, "up-pointing small triangle"),
    ],
)
def test_emoji_captions_are_what_one_would_say(name: str, colorfulness: float, caption: str):
    assert data._emoji_caption(name, colorfulness) == caption


def test_emoji_of_the_system_font(emoji: Emoji):
    assert_is_dataset(emoji, size=32)
    assert len(emoji) == len(emoji.codepoints) == len(set(emoji.codepoints))
    assert len(emoji) > 1000
    by_caption = dict(zip(emoji.captions, emoji.codepoints, strict=True))
    for char in "🐱🐶🍕🚀🌈😀":
        assert by_caption[unicodedata.name(char).lower()] == ord(char)
    for char in ("#", "7", "\U0001f1e6", "\U0001f3fb", "\U0001f9b0", "\u20e3"):
        assert ord(char) not in emoji.codepoints
    assert all(caption == caption.lower() and caption.strip() for caption in emoji.captions)


def test_emoji_of_the_system_font_look_right(emoji: Emoji):
    index = {codepoint: i for i, codepoint in enumerate(emoji.codepoints)}
    images, _ = emoji.batch(range(len(emoji)))
    assert images.flatten(1).std(dim=1).min() > 0.02  # no empty picture
    assert (images[:, :, 0, 0] == 1).all(dim=1).float().mean() > 0.95  # corners are background
    red, green, blue = color(emoji, index[ord("🔴")], 16, 16)
    assert red > 180
    assert max(green, blue) < 100
    small, large = (emoji[index[cp]][0].lt(0).float().mean() for cp in (0x25AA, 0x2B1B))  # black squares, small and large
    assert 0 < small < large / 4


# ---- ImageFolder


def write_folder(folder: Path, rows: list[object]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(file_name: str, text: str = "a picture") -> dict[str, str]:
    return {"file_name": file_name, "text": text}


def one_picture(folder: Path, file_name: str, size: int = 8) -> Pictures:
    return ImageFolder(write_folder(folder, [row(file_name)]), size=size)


def test_folder_reads_pictures_and_captions_in_order(tmp_path: Path):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (40, 30), RED).save(tmp_path / "red.png")
    Image.new("RGB", (10, 90), BLUE).save(tmp_path / "cats" / "blue ü.jpg", quality=95)
    ds = ImageFolder(write_folder(tmp_path, [row("red.png", "réd 🟥\u2028one"), "", row("cats/blue ü.jpg", " blue ")]), size=16)
    assert_is_dataset(ds, size=16)
    assert ds.captions == ["réd 🟥\u2028one", "blue"]
    assert ds.problems == []
    assert color(ds, 0, 8, 8) == RED
    assert ds[1][0][2].min() > 0.9
    assert open_dataset(str(tmp_path), size=8).captions == open_dataset(tmp_path, size=8).captions == ds.captions


def test_folder_crops_the_centre(tmp_path: Path):
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, :8], stripes[:, 8:16], stripes[:, 16:] = RED, GREEN, BLUE
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    ds = ImageFolder(write_folder(tmp_path, [row("wide.png"), row("tall.png")]), size=8)
    assert {color(ds, i, y, x) for i in (0, 1) for y in range(8) for x in range(8)} == {GREEN}


def test_folder_turns_pictures_upright(tmp_path: Path):
    picture = Image.new("RGB", (8, 8), BLUE)
    picture.paste(RED, (0, 0, 4, 8))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise, and left comes to the top
    picture.save(tmp_path / "turned.png", exif=exif)
    ds = one_picture(tmp_path, "turned.png")
    assert color(ds, 0, 1, 1) == color(ds, 0, 1, 6) == RED
    assert color(ds, 0, 6, 1) == color(ds, 0, 6, 6) == BLUE


def test_folder_puts_transparency_on_white(tmp_path: Path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=b"\x00")
    names = ["clear.png", "half.png", "la.png", "key.png", "palette.png"]
    ds = ImageFolder(write_folder(tmp_path, [row(name) for name in names]), size=8)
    assert [color(ds, i, 4, 4) for i in range(5)] == [WHITE, (255, 127, 127), WHITE, WHITE, WHITE]


def test_folder_converts_every_kind_of_pixel(tmp_path: Path):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "palette.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "gray.png")
    Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "gray16.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    frames = [Image.new("RGB", (8, 8), c) for c in (GREEN, RED)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    names = ["palette.png", "gray.png", "gray16.png", "bit.png", "cmyk.tiff", "moving.gif"]
    ds = ImageFolder(write_folder(tmp_path, [row(name) for name in names]), size=8)
    assert [color(ds, i, 4, 4) for i in range(6)] == [BLUE, (100,) * 3, (100,) * 3, WHITE, RED, GREEN]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_folder_turns_every_orientation_upright(tmp_path: Path, orientation: int, kind: str):
    """What a camera stores lying or mirrored comes out as it was seen: red, green, blue and white from corner to corner."""
    seen = Image.new("RGB", (32, 32))
    for n, c in enumerate((RED, GREEN, BLUE, WHITE)):
        seen.paste(c, (16 * (n % 2), 16 * (n // 2), 16 * (n % 2) + 16, 16 * (n // 2) + 16))
    turn = Image.Transpose
    stored = {
        1: [], 2: [turn.FLIP_LEFT_RIGHT], 3: [turn.ROTATE_180], 4: [turn.FLIP_TOP_BOTTOM], 5: [turn.TRANSPOSE],
        6: [turn.ROTATE_90], 7: [turn.TRANSVERSE], 8: [turn.ROTATE_270],
    }[orientation]  # fmt: skip
    picture = seen
    for step in stored:
        picture = picture.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"a.{kind}", exif=exif, **({"quality": 100, "subsampling": 0} if kind == "jpg" else {}))
    ds = one_picture(tmp_path, f"a.{kind}", size=32)
    for (y, x), c in zip(((4, 4), (4, 27), (27, 4), (27, 27)), (RED, GREEN, BLUE, WHITE), strict=True):
        assert np.abs(np.subtract(color(ds, 0, y, x), c)).max() < (12 if kind != "png" else 1), (y, x)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", exif=exif)
    assert color(one_picture(tmp_path, "a.png"), 0, 4, 4) == RED


def test_folder_takes_the_first_frame_of_every_kind_of_animation(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), c) for c in (GREEN, RED, BLUE)]
    names = ["moving.gif", "moving.png", "moving.webp", "pages.tiff"]
    for name in names:
        lossless = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    Image.new("RGB", (8, 8), GREEN).save(  # two pictures in one JPEG, as some cameras make them
        tmp_path / "two.jpg", format="MPO", save_all=True, append_images=frames[1:], quality=100, subsampling=0
    )
    ds = ImageFolder(write_folder(tmp_path, [row(name) for name in [*names, "two.jpg"]]), size=8)
    assert [color(ds, i, 4, 4) for i in range(4)] == [GREEN] * 4
    assert np.abs(np.subtract(color(ds, 4, 4, 4), GREEN)).max() < 6


def test_folder_converts_the_rarer_kinds_of_pixel_too(tmp_path: Path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("YCbCr", (8, 8), (76, 85, 255)).save(tmp_path / "ycbcr.tiff")
    Image.new("LA", (8, 8), (100, 255)).save(tmp_path / "la.png")
    Image.new("P", (8, 8), 3).save(tmp_path / "empty palette.png")
    Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "gray16.tiff")
    Image.fromarray(np.full((8, 8), 100 * 257, dtype=">u2")).save(tmp_path / "turned16.tiff")
    deep = b"P6 8 8 65535\n" + struct.pack(">3H", 65535, 0, 0) * 64
    (tmp_path / "deep.ppm").write_bytes(deep)
    wanted = {"cmyk.jpg": RED, "ycbcr.tiff": RED, "la.png": (100,) * 3, "gray16.tiff": (100,) * 3, "deep.ppm": RED}
    wanted["turned16.tiff"] = (100,) * 3
    ds = ImageFolder(write_folder(tmp_path, [row(name) for name in wanted]), size=8)
    for n, c in enumerate(wanted.values()):
        assert np.abs(np.subtract(color(ds, n, 4, 4), c)).max() < 8, ds.captions[n]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def a_bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


def a_png(width: int, height: int, *between: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def test_folder_leaves_out_bombs_and_pictures_of_no_size_and_needs_no_memory(tmp_path: Path):
    """Small files that promise what no memory holds; Pillow's limit is as it is outside of tests."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    text = zlib.compress(bytes(200 * 2**20), 9)  # 200 KB that become 200 MB
    bombs = {
        "wide.png": a_png(2**31 - 1, 1), "large.png": a_png(60_000, 60_000), "huge.png": a_png(2**31 - 1, 2**31 - 1),
        "text.png": a_png(8, 8, chunk(b"zTXt", b"Comment\0\0" + text), pixels=bytes(8 * 25)),
        "profile.png": a_png(8, 8, chunk(b"iCCP", b"icc\0\0" + text), pixels=bytes(8 * 25)),
        "none.png": a_png(0, 8), "no.png": a_png(8, 0), "short.png": a_png(8, 8, pixels=bytes(7)),
        "none.gif": b"GIF89a" + bytes(4) + b"\x00\x00\x00;", "large.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + b",\0\0\0\0"
        + b"\xff\xff\xff\xff\x00\x02\x00;", "none.bmp": a_bmp(0, 0), "large.bmp": a_bmp(2**30, 2**30),
        "large.ppm": b"P6 99999 99999 255\n", "half.png": whole[: len(whole) // 2], "head.png": whole[:8],
    }  # fmt: skip
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    write_folder(tmp_path, [row(name) for name in ["good.png", *bombs]])
    before = peak_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = ImageFolder(tmp_path, size=8)
    grown = peak_memory() - before
    named = " ".join(ds.problems)
    kept = {"text.png", "profile.png"} - {name for name in bombs if name in named}  # a note that is left unread harms nobody
    assert {name for name in bombs if name not in named} == kept
    assert len(ds) == 1 + len(kept)
    assert color(ds, 0, 4, 4) == RED
    assert grown < 100 * 2**20


def peak_memory() -> int:
    """In bytes; 0 where nobody says."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_folder_names_a_picture_that_was_cut_anywhere(tmp_path: Path, kind: str):
    """A half-copied picture is left out, and never half grey; where what is missing is no pixel, it is the whole picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    Image.new("RGB", (8, 8), RED).save(tmp_path / "good.png")
    lengths = [len(whole) * k // 20 for k in range(20)]
    for length in lengths:
        (tmp_path / f"{length}").write_bytes(whole[:length])
    write_folder(tmp_path, [row("good.png"), row("whole"), *(row(f"{length}", f"{length}") for length in lengths)])
    with pytest.warns(UserWarning, match="left out"):
        ds = ImageFolder(tmp_path, size=24)
    assert len(ds.problems) >= 17
    for n in range(2, len(ds)):
        assert torch.equal(ds.pixels[n], ds.pixels[1]), ds.captions[n]


def test_folder_names_bad_lines_and_goes_on(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), RED).save(folder / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:5000])
    (folder / "note.png").write_text("these are words")
    (folder / "empty.jpg").touch()
    Image.new("F", (8, 8), 0.5).save(folder / "float.tiff")
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # must not reach Ghostscript
    (folder / "empty.ppm").write_bytes(b"P6 0 0 255\n")
    rows = [
        (row("good.png", "kept"), None),
        ("{broken", "line 2: is not a JSON object"),
        ('["a", "list"]', "line 3: is not a JSON object"),
        ("[" * 100_000, "line 4: is not a JSON object"),
        ({"text": "no file"}, 'line 5: has no "file_name"'),
        ({"file_name": "good.png"}, 'line 6: has no "text"'),
        (row("good.png", "  "), 'line 7: has no "text"'),
        (row("good.png", "\ud800"), 'line 8: has half a surrogate pair in "text"'),
        (row("cats/x.png"), "line 9: cats/x.png: no such file"),
        (row("."), "line 10: .: no such file"),
        (row("cut.png"), "line 11: cut.png: cannot be read as an image (image file is truncated"),
        (row("note.png"), "line 12: note.png: is no readable PNG"),
        (row("empty.jpg"), "line 13: empty.jpg: is no readable PNG"),
        (row("float.tiff"), "line 14: float.tiff: has pixels of more than 16 bits"),
        (row("drawing.eps"), "line 15: drawing.eps: is no readable PNG"),
        (row("empty.ppm"), "line 16: empty.ppm: is no readable PNG"),
        (row("a\0b.png"), "line 17: a\0b.png: is no usable path"),
        (row("n" * 5000), f"line 18: {'n' * 5000}: is no usable path"),
        ({"file_name": 7, "text": "a number"}, 'line 19: has no "file_name"'),
    ]
    write_folder(folder, [content for content, _ in rows])
    with pytest.warns(UserWarning, match="left out 18 of 19 lines, first line 2") as caught:
        ds = ImageFolder(folder, size=8)
    assert len(caught) == 1
    assert ds.captions == ["kept"]
    expected = [problem for _, problem in rows if problem]
    assert len(ds.problems) == len(expected)
    for problem, start in zip(ds.problems, expected, strict=True):
        assert problem.startswith(start)


def test_folder_opens_nothing_outside_itself(tmp_path: Path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "secret.png")
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8), BLUE).save(folder / "inside.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "door").symlink_to(tmp_path)
    (folder / "fine.png").symlink_to(folder / "inside.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "door/secret.png", "sub/../../secret.png"]
    inside = ["inside.png", "sub/../inside.png", "fine.png"]
    write_folder(folder, [row(name, name) for name in (*outside, *inside, "circle.png")])
    with pytest.warns(UserWarning, match="left out 6 of 9"):
        ds = ImageFolder(folder, size=8)
    assert ds.captions == inside
    for problem, name in zip(ds.problems, outside, strict=False):
        assert f": {name}: leads outside the folder" in problem


@pytest.mark.parametrize("limit", [100, 40])  # Pillow only warns up to twice its limit, and raises beyond
def test_folder_refuses_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "small.png")
    Image.new("RGB", (12, 12), RED).save(tmp_path / "bomb.png")
    Image.new("RGB", (6, 6), RED).save(tmp_path / "tiny.png")
    write_folder(tmp_path, [row("bomb.png"), row("tiny.png")])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        ds = ImageFolder(tmp_path, size=8)
    assert ds.problems == [f"line 1: bomb.png: has more than {limit} pixels; make it smaller"]


def test_folder_keeps_a_very_long_picture_small_in_memory(tmp_path: Path):
    Image.new("RGB", (50_000, 1), RED).save(tmp_path / "thread.png")
    assert color(one_picture(tmp_path, "thread.png"), 0, 4, 4) == RED


def test_folder_without_use_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder at"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r'no metadata\.jsonl in .*\{"file_name"'):
        ImageFolder(tmp_path)
    metadata = tmp_path / "metadata.jsonl"
    for content in (b"file_name,text\ncat.png,a cat\n", b"\xff\xfe\x00\x01 binary", '{"file_name": "x"}'.encode("utf-16")):
        metadata.write_bytes(content)
        with pytest.raises(ValueError, match="not JSON lines in UTF-8"):
            ImageFolder(tmp_path)
    metadata.write_bytes(b"\n\n")
    with pytest.raises(ValueError, match=r"no usable picture \(metadata\.jsonl is empty\)"):
        ImageFolder(tmp_path)
    write_folder(tmp_path, [row("missing.png")])
    with pytest.raises(ValueError, match=r"no usable picture \(line 1: missing\.png: no such file\)"):
        ImageFolder(tmp_path)


def test_folder_accepts_windows_line_ends_and_byte_order_mark(tmp_path: Path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png")
    line = json.dumps(row("a.png", "first")).encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    assert ImageFolder(tmp_path, size=8).captions == ["first", "first"]


# ---- torchvision


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of the MNIST files: a magic number, the shape in big-endian, the bytes."""
    path.write_bytes(struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes())


def write_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    for part, labels in (("train", [7, 0, 9]), ("t10k", [1])):
        images = np.stack([np.full((28, 28), 20 * label, dtype=np.uint8) for label in labels])
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "folder", "captions"),
    [
        ("mnist", "MNIST", ["a handwritten digit seven", "a handwritten digit zero", "a handwritten digit nine"]),
        ("fashion-mnist", "FashionMNIST", ["a photo of a sneaker", "a photo of a t-shirt", "a photo of an ankle boot"]),
    ],
)
def test_mnist_files(tmp_path: Path, name: str, folder: str, captions: list[str]):
    write_mnist(tmp_path / folder / "raw")
    ds = torchvision_set(name, root=tmp_path, size=16)
    assert_is_dataset(ds, size=16)
    assert (ds.name, ds.captions) == (name, captions)
    assert [color(ds, i, 8, 8) for i in range(3)] == [(140,) * 3, (0,) * 3, (180,) * 3]
    assert len(torchvision_set(name, root=tmp_path, train=False)) == 1


def test_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        blob = pickle.dumps(content)
        (folder / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch(label: int) -> dict:
        planes = np.repeat(np.array([[200, 100, 50]], dtype=np.uint8), 1024, axis=1)  # all red, then all green, then all blue
        return {"data": planes, "labels": [label]}

    # torchvision checks its md5 lists before it unpickles; the stand-ins get lists of their own.
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(5)), write("data_batch_2", batch(0))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(9))])
    meta_md5 = write("batches.meta", {"label_names": []})[1]
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta_md5})
    ds = torchvision_set("cifar10", root=tmp_path)
    assert_is_dataset(ds, size=32)
    assert ds.captions == ["a photo of a dog", "a photo of an airplane"]
    assert color(ds, 0, 3, 20) == (200, 100, 50)
    assert torchvision_set("cifar10", root=tmp_path, train=False).captions == ["a photo of a truck"]

    monkeypatch.undo()  # with the published checksums these files are not CIFAR-10, and nothing may unpickle them
    with pytest.raises(FileNotFoundError, match=r"corrupted.*delete it first"):
        torchvision_set("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_absent_sets_say_how_to_get_them_and_fetch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    calls = []

    def no_network(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise URLError("no network here")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match=rf"torchvision_set\('{name}', root='.*', download=True\) fetches it"):
        torchvision_set(name, root=tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="root='datasets', download=True"):
        open_dataset(name, size=32)
    assert calls == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no network.*fetches it \(\d+ MB\)"):
        torchvision_set(name, root=tmp_path, download=True)
    assert calls


def test_damaged_mnist_is_named(tmp_path: Path):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    write_idx(raw / "train-labels-idx1-ubyte", np.array([1, 2, 10], dtype=np.uint8))  # there is no eleventh digit
    with pytest.raises(FileNotFoundError, match="mnist is missing or damaged under"):
        torchvision_set("mnist", root=tmp_path)
    write_idx(raw / "train-labels-idx1-ubyte", np.array([1, 2], dtype=np.uint8))  # a label too few
    with pytest.raises(FileNotFoundError, match="3 pictures and 2 captions"):
        torchvision_set("mnist", root=tmp_path)
    images = raw / "train-images-idx3-ubyte"
    for length in (100, 8, 0):
        images.write_bytes(images.read_bytes()[:length])
        with pytest.raises(FileNotFoundError, match="delete it first"):
            torchvision_set("mnist", root=tmp_path)


def test_captions_follow_the_order_of_the_classes():
    from torchvision.datasets import FashionMNIST

    captions = data._TORCHVISION["fashion-mnist"][3]
    words = [label.lower().split("/")[0] for label in FashionMNIST.classes]
    assert all(word in caption for word, caption in zip(words, captions, strict=True))
    assert [len(entry[3]) for entry in data._TORCHVISION.values()] == [10, 10, 10]
    with pytest.raises(ValueError, match="mnist, fashion-mnist, cifar10"):
        torchvision_set("imagenet")


# ---- open_dataset


def test_open_dataset_by_name(monkeypatch: pytest.MonkeyPatch, tiny_font: Path, tmp_path: Path):
    assert (open_dataset("shapes", size=32).name, open_dataset("shapes", size=32).size) == ("shapes", 32)
    monkeypatch.setattr(data, "EMOJI_FONTS", (str(tiny_font),))
    assert (open_dataset("emoji", size=24).name, open_dataset("emoji", size=24).size) == ("emoji", 24)
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "datasets" / "MNIST" / "raw")
    assert (open_dataset("mnist", size=8).name, open_dataset("mnist", size=8).size) == ("mnist", 8)


def test_open_dataset_refuses_the_unknown_and_lists_the_known(tmp_path: Path):
    for unknown in ("shapez", str(tmp_path / "none"), tmp_path / "none"):
        with pytest.raises(ValueError, match="shapes, emoji, mnist, fashion-mnist, cifar10, or give a folder"):
            open_dataset(unknown, size=32)


def test_open_dataset_prefers_the_name_and_takes_a_folder_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "shapes", [row("a.png", "mine")])
    Image.new("RGB", (8, 8), RED).save(tmp_path / "shapes" / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset("./shapes", size=8).captions == ["mine"]
    assert open_dataset("shapes", size=32).name == "shapes"
    assert not isinstance(open_dataset("shapes", size=32), Pictures)
