"""Pictures in memory with their captions, and how they come from a folder of your own.

A folder is a stranger's: names that lead out of it, broken files and bombs are left out and named, never followed.
"""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: reading one runs Ghostscript


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
        check_size(size)
        root = Path(folder).expanduser().resolve()
        lines = _read_metadata(root)
        self.problems: list[str] = []
        pixels, captions = [], []
        for number, line in lines:
            where = f"line {number}"
            try:
                file_name, text = _parse_row(line)
                where = f"line {number}: {file_name}"
                pixels.append(to_pixels(load_picture(_resolve_inside(root, file_name)), size))
                captions.append(text)
            except BadRow as problem:
                self.problems.append(f"{where}: {problem}")
        if not captions:
            shown = "; ".join(self.problems[:3]) or "metadata.jsonl is empty"
            raise ValueError(f"{root} has no usable picture ({shown}); mend metadata.jsonl or the files it names")
        if self.problems:
            count = f"{len(self.problems)} of {len(lines)} lines"
            warnings.warn(f"{root}: left out {count}, first {self.problems[0]} (all are in .problems)", stacklevel=2)
        super().__init__(name=root.name, pixels=torch.stack(pixels), captions=captions)


class BadRow(Exception):
    """Why one picture, or one line of metadata.jsonl, cannot be used."""


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
        raise BadRow("is not a JSON object")
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BadRow(f'has no "{key}"')
        if re.search("[\ud800-\udfff]", row[key]):
            raise BadRow(f'has half a surrogate pair in "{key}"')
    return row["file_name"], row["text"].strip()


def _resolve_inside(root: Path, file_name: str) -> Path:
    try:
        path = (root / file_name).resolve()
        inside, exists = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, links in a circle
        raise BadRow(f"is no usable path ({error})") from None
    if not inside:
        raise BadRow("leads outside the folder; copy the picture into it")
    if not exists:
        raise BadRow("no such file")
    return path


def load_picture(file: Path | BinaryIO) -> Image.Image:
    """The central square of a picture file, upright, RGB, on white.

    Raises:
        BadRow: it is no picture that can be read, or too large a one; says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_PICTURE_FORMATS) as picture:
                return _square_rgb(ImageOps.exif_transpose(picture))
    except BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadRow(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise BadRow("is no readable PNG, JPEG, WebP, GIF, BMP, TIFF or PPM picture") from None
    except Exception as error:  # a decoder that is given a broken file may raise anything
        raise BadRow(f"cannot be read as an image ({error})") from None


def _square_rgb(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((x, y, x + side, y + side))
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip these at 255
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BadRow("has pixels of more than 16 bits; save it with 8 bits a channel")
        picture = Image.fromarray((values // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def check_size(size: int) -> None:
    """Raises a ValueError unless a picture can have this side, in pixels."""
    if size < 1:
        raise ValueError(f"size is {size}; it is the side of a picture in pixels, so 1 or more (usually 32 or 64)")


def to_pixels(picture: Image.Image, size: int) -> Tensor:
    """Resize a square RGB picture to (3, size, size) uint8."""
    resized = picture.resize((size, size), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(resized)), "h w c -> c h w")
