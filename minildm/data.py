"""Pictures with captions: emoji, your own folder, three classic sets, and `Shapes` by name.

Every dataset here is the same small thing: uint8 pixels in memory, one caption a picture, no shuffling, no augmentation, no
state.  `ds[i]` gives one (image, caption) pair, `ds.batch(indices)` many at once; images are float32 in [-1, 1].
"""

import json
import re
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from .shapes import Shapes

EMOJI_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch, Alpine
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/truetype/NotoColorEmoji.ttf",  # openSUSE
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",  # macOS
    "C:/Windows/Fonts/seguiemj.ttf",  # Windows
)
_FONT_SIZES = (109, 160, 96)  # a bitmap font has one size or a few: Noto 109, Apple 160 and 96; outlines take any
_EMOJI_BLOCKS = (0xA9, 0xAE, *range(0x203C, 0x3300), *range(0x1F000, 0x20000))  # where Unicode keeps all its emoji
_NOT_PICTURES = re.compile("regional indicator|emoji modifier|emoji component|combining|tag|squared cjk")
_REWRITES = (
    (r"^heavy black heart$", "red heart"),
    (r"\b(wo)?m([ae])ns\b", r"\1m\2n's"),
    (r"oclock\b", "o'clock"),
    (r"^lower left ", ""),
    (r"pointing small red ", "pointing small "),  # drawn in other colours
)
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: reading one runs Ghostscript

_DIGITS = "zero one two three four five six seven eight nine"
_CLOTHES = "a t-shirt, trousers, a pullover, a dress, a coat, a sandal, a shirt, a sneaker, a bag, an ankle boot"
_THINGS = "an airplane, an automobile, a bird, a cat, a deer, a dog, a frog, a horse, a ship, a truck"
_TORCHVISION = {  # torchvision's class, its folder under root, megabytes to fetch, the caption of each class
    "mnist": ("MNIST", "MNIST", 12, [f"a handwritten digit {digit}" for digit in _DIGITS.split()]),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST", 31, [f"a photo of {item}" for item in _CLOTHES.split(", ")]),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 170, [f"a photo of {thing}" for thing in _THINGS.split(", ")]),
}


class Pictures:
    """Captioned pictures, all of one size, held in memory.

    Args:
        name: what the set is called.
        pixels: RGB, (N, 3, size, size) uint8, N at least 1.
        captions: N strings.

    Raises:
        ValueError: pixels and captions do not fit together, or there are none.
    """

    def __init__(self, name: str, pixels: Tensor, captions: list[str]) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"pixels must be (N, 3, size, size) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
        if len(pixels) != len(captions) or not captions:
            raise ValueError(f"{len(pixels)} pictures and {len(captions)} captions; each picture needs exactly one")
        self.name, self.size = name, pixels.shape[-1]
        self.pixels, self.captions = pixels, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """One image, (3, size, size) float32 in [-1, 1], and its caption."""
        return self.pixels[index].float() / 127.5 - 1, self.captions[index]

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, list[str]]:
        """Several pictures at once.

        Args:
            indices: integers below len(self), in any order: a list, a range, a tensor.

        Returns:
            Images, (N, 3, size, size) float32 in [-1, 1], and N captions.

        Raises:
            IndexError: an index is outside the set.
        """
        rows = [int(i) for i in indices]
        return self.pixels[rows].float() / 127.5 - 1, [self.captions[i] for i in rows]


class Emoji(Pictures):
    """Every one-character emoji that a colour font draws, captioned with its Unicode name.

    Which they are depends on the font and on the names that this Python knows; `codepoints` lists them.

    Args:
        size: side of the pictures in pixels.
        font: path of a colour font; by default the system's own.
        background: colour behind the emoji, three integers in [0, 255].

    Raises:
        FileNotFoundError: there is no such font; says which package has one.
        ValueError: the font is damaged or has no colour emoji, or size is not positive.
    """

    def __init__(
        self, size: int = 32, font: str | Path | None = None, background: tuple[int, int, int] = (255, 255, 255)
    ) -> None:
        _check_size(size)
        self.font = find_emoji_font(font)
        face = _load_font(self.font)
        captions, boxes = {}, {}
        for codepoint in _EMOJI_BLOCKS:
            name = unicodedata.name(chr(codepoint), "").lower()
            if name and not _NOT_PICTURES.match(name) and (glyph := _measure(chr(codepoint), face)):
                boxes[codepoint], colorfulness = glyph
                captions[codepoint] = _emoji_caption(name, colorfulness)
        if not boxes:
            raise ValueError(f"{self.font} has no colour emoji that Pillow can draw; pass font= a NotoColorEmoji.ttf (bitmaps)")

        side = max(max(right - left, bottom - top) for left, top, right, bottom in boxes.values())
        pixels = []
        for codepoint, (left, top, right, bottom) in boxes.items():  # one scale for all: a small square stays small
            canvas = Image.new("RGB", (side, side), background)
            pen = ((side - right - left) // 2, (side - bottom - top) // 2)
            ImageDraw.Draw(canvas).text(pen, chr(codepoint), font=face, fill="black", embedded_color=True)
            pixels.append(_to_pixels(canvas, size))
        self.codepoints = list(boxes)
        super().__init__(name="emoji", pixels=torch.stack(pixels), captions=list(captions.values()))


def find_emoji_font(font: str | Path | None = None) -> Path:
    """The colour emoji font to draw with.

    Args:
        font: a path to use instead of the usual places, EMOJI_FONTS.

    Raises:
        FileNotFoundError: nothing is there; names the package to install.
    """
    for path in EMOJI_FONTS if font is None else (font,):
        if Path(path).expanduser().is_file():
            return Path(path).expanduser()
    missing = "no colour emoji font on this system" if font is None else f"no font file at {font}"
    raise FileNotFoundError(
        f"{missing}; apt-get install fonts-noto-color-emoji, or pass the path of a NotoColorEmoji.ttf as Emoji(font=...)"
    )


def _load_font(path: Path) -> ImageFont.FreeTypeFont:
    for size in _FONT_SIZES:
        try:
            return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            reason = error
    raise ValueError(f"{path} cannot be used as a font ({reason}); pass font= a NotoColorEmoji.ttf")


def _measure(char: str, face: ImageFont.FreeTypeFont) -> tuple[tuple[int, int, int, int], float] | None:
    """Where a colour glyph lies, seen from the pen, and how colourful it is in [0, 255]; None if it is no colour glyph."""
    left, top, right, bottom = (int(edge) for edge in face.getbbox(char))
    if right <= left or bottom <= top:
        return None
    tile, ink = Image.new("RGBA", (right - left, bottom - top)), (255, 0, 255)
    ImageDraw.Draw(tile).text((-left, -top), char, font=face, fill=ink, embedded_color=True)
    values = np.asarray(tile)
    solid = values[values[..., 3] == 255][:, :3]  # (H, W, 4) -> (N, 3)
    if (solid == ink).all():  # nothing there, or an ordinary outline that took our ink
        return None
    x0, y0, x1, y1 = tile.getchannel("A").getbbox()
    return (left + x0, top + y0, left + x1, top + y1), float(np.ptp(solid, axis=1).mean())


def _emoji_caption(name: str, colorfulness: float) -> str:
    for pattern, replacement in _REWRITES:
        name = re.sub(pattern, replacement, name)
    if colorfulness > 40:  # Unicode's "black" means filled and its "white" outlined: its "white medium star" is yellow
        name = re.sub(r"\b(black|white) ", "", name)
    return name


class ImageFolder(Pictures):
    """A folder of your own pictures, captioned by its metadata.jsonl: a line {"file_name": ..., "text": ...} for each.

    Each picture is turned upright, cropped to its central square and resized; transparency becomes white; of an animation the
    first frame counts.  A line that cannot be used is left out and named in `problems`, with one warning for all of them.

    Args:
        folder: the folder with metadata.jsonl; every file_name is relative to it and must lead to a file inside it.
        size: side of the pictures in pixels.

    Raises:
        FileNotFoundError: there is no such folder, or no metadata.jsonl in it.
        ValueError: metadata.jsonl is not JSON lines, no picture can be used, or size is not positive.
    """

    def __init__(self, folder: str | Path, size: int = 64) -> None:
        _check_size(size)
        root = Path(folder).expanduser().resolve()
        lines = _read_metadata(root)
        self.problems: list[str] = []
        pixels, captions = [], []
        for number, line in lines:
            where = f"line {number}"
            try:
                file_name, text = _parse_row(line)
                where = f"line {number}: {file_name}"
                pixels.append(_to_pixels(_load_picture(_resolve_inside(root, file_name)), size))
                captions.append(text)
            except _BadRow as problem:
                self.problems.append(f"{where}: {problem}")
        if not captions:
            shown = "; ".join(self.problems[:3]) or "metadata.jsonl is empty"
            raise ValueError(f"{root} has no usable picture ({shown}); mend metadata.jsonl or the files it names")
        if self.problems:
            count = f"{len(self.problems)} of {len(lines)} lines"
            warnings.warn(f"{root}: left out {count}, first {self.problems[0]} (all are in .problems)", stacklevel=2)
        super().__init__(name=root.name, pixels=torch.stack(pixels), captions=captions)


class _BadRow(Exception):
    """Why one line of metadata.jsonl cannot be used."""


def _read_metadata(root: Path) -> list[tuple[int, bytes]]:
    path, example = root / "metadata.jsonl", '{"file_name": "cat.png", "text": "a cat on a sofa"}'
    if not path.is_file():
        missing = f"no metadata.jsonl in {root}" if root.is_dir() else f"no folder at {root}, so no metadata.jsonl"
        raise FileNotFoundError(f"{missing}; it needs a line such as {example} for each picture")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if lines and all(_json_or_none(line) is None for _, line in lines):
        raise ValueError(f"{path} is not JSON lines in UTF-8; it needs a line such as {example} for each picture")
    return lines


def _json_or_none(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _parse_row(line: bytes) -> tuple[str, str]:
    row = _json_or_none(line)
    if not isinstance(row, dict):
        raise _BadRow("is not a JSON object")
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _BadRow(f'has no "{key}"')
        if re.search("[\ud800-\udfff]", row[key]):
            raise _BadRow(f'has half a surrogate pair in "{key}"')
    return row["file_name"], row["text"].strip()


def _resolve_inside(root: Path, file_name: str) -> Path:
    try:
        path = (root / file_name).resolve()
        inside, exists = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, links in a circle
        raise _BadRow(f"is no usable path ({error})") from None
    if not inside:
        raise _BadRow("leads outside the folder; copy the picture into it")
    if not exists:
        raise _BadRow("no such file")
    return path


def _load_picture(path: Path) -> Image.Image:
    """The central square of a picture file, upright, RGB, on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_PICTURE_FORMATS) as file:
                return _square_rgb(ImageOps.exif_transpose(file))
    except _BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _BadRow(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise _BadRow("is no readable PNG, JPEG, WebP, GIF, BMP, TIFF or PPM picture") from None
    except Exception as error:  # a decoder that is given a broken file may raise anything
        raise _BadRow(f"cannot be read as an image ({error})") from None


def _square_rgb(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((x, y, x + side, y + side))
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip these at 255
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise _BadRow("has pixels of more than 16 bits; save it with 8 bits a channel")
        picture = Image.fromarray((values // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def torchvision_set(
    name: str, root: str | Path = "datasets", size: int = 32, train: bool = True, download: bool = False
) -> Pictures:
    """MNIST, Fashion-MNIST or CIFAR-10, captioned with a phrase for each class.

    Args:
        name: "mnist", "fashion-mnist" or "cifar10".
        root: the folder where torchvision keeps its datasets.
        size: side of the pictures in pixels.
        train: the training part, or else the test part.
        download: fetch the files if they are not there; otherwise nothing touches the network.

    Raises:
        FileNotFoundError: the files are missing, damaged, or could not be fetched; says how to get them.
        ValueError: the name is unknown, or size is not positive.
    """
    _check_size(size)
    if name not in _TORCHVISION:
        raise ValueError(f"no torchvision set is called {name!r} here; there are {', '.join(_TORCHVISION)}")
    import torchvision.datasets  # here, because it is slow and most runs do without

    kind, folder, megabytes, class_captions = _TORCHVISION[name]
    remedy = (
        f"torchvision_set({name!r}, root={str(root)!r}, download=True) fetches it ({megabytes} MB) where there is a network; "
        f"if {Path(root) / folder} is there, delete it first"
    )
    try:
        source = getattr(torchvision.datasets, kind)(root=root, train=train, download=download)
        captions = [class_captions[int(label)] for label in source.targets]
        pixels = torch.stack([_to_pixels(Image.fromarray(np.asarray(values)).convert("RGB"), size) for values in source.data])
        return Pictures(name=name, pixels=pixels, captions=captions)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, LookupError) as error:
        reason = " ".join(str(error).split()) or "a file is cut short"
        raise FileNotFoundError(f"{name} is missing or damaged under {root} ({reason}); {remedy}") from error


def open_dataset(name_or_dir: str | Path, size: int) -> Pictures | Shapes:
    """A dataset by its name, or the folder at that path; nothing is downloaded.

    Args:
        name_or_dir: "shapes", "emoji", "mnist", "fashion-mnist", "cifar10", or a folder with a metadata.jsonl; a folder that
            is called like a dataset is reached as "./emoji".
        size: side of the pictures in pixels.

    Raises:
        FileNotFoundError: what the dataset needs is not on this machine; says how to get it.
        ValueError: there is no such dataset or folder, or the dataset refuses the size.
    """
    if name_or_dir == "shapes":
        return Shapes(size=size)
    if name_or_dir == "emoji":
        return Emoji(size=size)
    if name_or_dir in _TORCHVISION:
        return torchvision_set(name_or_dir, size=size)
    if Path(name_or_dir).expanduser().is_dir():
        return ImageFolder(name_or_dir, size=size)
    names = ", ".join(["shapes", "emoji", *_TORCHVISION])
    raise ValueError(
        f"no dataset and no folder is called {str(name_or_dir)!r}; there are {names}, or give a folder of pictures"
    )


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size is {size}; it is the side of a picture in pixels, so 1 or more (usually 32 or 64)")


def _to_pixels(picture: Image.Image, size: int) -> Tensor:
    """Resize a square RGB picture to (3, size, size) uint8."""
    resized = picture.resize((size, size), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(resized)), "h w c -> c h w")
