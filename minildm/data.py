"""Pictures with captions: emoji, three classic sets, and every dataset by its name.

Every dataset here is the same small thing: uint8 pixels in memory, one caption a picture, no shuffling, no augmentation, no
state.  `ds[i]` gives one (image, caption) pair, `ds.batch(indices)` many at once; images are float32 in [-1, 1].
"""

import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from minildm.folder import ImageFolder, Pictures, check_size, to_pixels
from minildm.shapes import Shapes
from minildm.shards import Shards

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

_DIGITS = "zero one two three four five six seven eight nine"
_CLOTHES = "a t-shirt, trousers, a pullover, a dress, a coat, a sandal, a shirt, a sneaker, a bag, an ankle boot"
_THINGS = "an airplane, an automobile, a bird, a cat, a deer, a dog, a frog, a horse, a ship, a truck"
_TORCHVISION = {  # torchvision's class, its folder under root, megabytes to fetch, the caption of each class
    "mnist": ("MNIST", "MNIST", 12, [f"a handwritten digit {digit}" for digit in _DIGITS.split()]),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST", 31, [f"a photo of {item}" for item in _CLOTHES.split(", ")]),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 170, [f"a photo of {thing}" for thing in _THINGS.split(", ")]),
}


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
        check_size(size)
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
            pixels.append(to_pixels(canvas, size))
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
    check_size(size)
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
        pixels = torch.stack([to_pixels(Image.fromarray(np.asarray(values)).convert("RGB"), size) for values in source.data])
        return Pictures(name=name, pixels=pixels, captions=captions)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, LookupError) as error:
        reason = " ".join(str(error).split()) or "a file is cut short"
        raise FileNotFoundError(f"{name} is missing or damaged under {root} ({reason}); {remedy}") from error


def open_dataset(name_or_dir: str | Path, size: int) -> Pictures | Shapes | Shards:
    """A dataset by its name, or the folder at that path; nothing is downloaded.

    Args:
        name_or_dir: "shapes", "emoji", "mnist", "fashion-mnist", "cifar10", or a folder with a metadata.jsonl, or with .tar
            files; a folder that is called like a dataset is reached as "./emoji".
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
    if (folder := Path(name_or_dir).expanduser()).is_dir():
        packed = any(folder.glob("*.tar")) and not (folder / "metadata.jsonl").exists()
        return Shards(folder, size=size) if packed else ImageFolder(folder, size=size)
    names = ", ".join(["shapes", "emoji", *_TORCHVISION])
    raise ValueError(
        f"no dataset and no folder is called {str(name_or_dir)!r}; there are {names}, or give a folder of pictures"
    )
