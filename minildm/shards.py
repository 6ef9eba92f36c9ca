"""Pictures in tar files, as large sets are kept: read where they lie, one at a time, and never all in memory.

The layout is WebDataset's: a picture and its caption are two files of one name side by side, `0001.jpg` and `0001.txt`, or
`0001.json` with a "text" or a "caption" in it.  Nothing is ever unpacked, so no name in an archive leads anywhere, and any
picture can be had by its number, so that a training draws them in its own order and goes on after a stop as if there had been
none.
"""

import io
import json
import tarfile
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minildm.checkpoint import write_atomically
from minildm.folder import BadRow, check_size, load_picture, to_pixels

PICTURE_KINDS = ("jpg", "jpeg", "png", "webp")
CAPTION_KINDS = ("txt", "json")
LARGEST = 2**26  # bytes of one file in a shard; a header that claims more is not believed


class Shards:
    """Captioned pictures in all the .tar files of a folder, in the order of their names.

    What cannot be used is left out and named in `problems`: when the folder is opened, files without a partner, links and
    whatever else is no plain file; later, a picture that turns out to be damaged, in whose place the next one stands.

    Args:
        folder: the folder with the .tar files, not compressed: a compressed one has no places to go to.
        size: side of the pictures in pixels; they are prepared as `ImageFolder` does.

    Raises:
        FileNotFoundError: there is no such folder, or no .tar in it.
        ValueError: a shard is damaged or compressed, no picture can be used, or size is not positive.
    """

    def __init__(self, folder: str | Path, size: int = 64) -> None:
        check_size(size)
        root = Path(folder).expanduser()
        self.paths = sorted(path for path in root.glob("*.tar") if path.is_file())
        if not self.paths:
            raise FileNotFoundError(f"no .tar in {root}; a shard holds pairs such as 0001.jpg and 0001.txt, uncompressed")
        self.name, self.size, self.problems = root.resolve().name, size, []
        places = [row for number, path in enumerate(self.paths) for row in self._scan(number, path)]
        if not places:
            raise ValueError(f"{root} has no usable picture ({'; '.join(self.problems[:3]) or 'its shards are empty'})")
        if self.problems:
            warnings.warn(
                f"{root}: left out {len(self.problems)}, first {self.problems[0]} (all are in .problems)", stacklevel=2
            )
        self._places = np.array(places, dtype=np.int64)  # (N, 6): 48 bytes a picture are all that stays in memory

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """One image, (3, size, size) float32 in [-1, 1], and its caption."""
        images, captions = self.batch([index])
        return images[0], captions[0]

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, list[str]]:
        """The pictures with these numbers, (N, 3, size, size) float32 in [-1, 1], and their captions.

        Raises:
            IndexError: an index is outside the set.
            ValueError: so many pictures in a row are damaged that something else must be wrong.
        """
        pixels, captions = [], []
        for index in map(int, indices):
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is outside [0, {len(self)})")
            image, caption = self._read(index)
            pixels.append(image)
            captions.append(caption)
        return torch.stack(pixels).float() / 127.5 - 1, captions

    def _scan(self, number: int, path: Path) -> list[tuple[int, ...]]:
        """Where each pair of a shard lies: (shard, picture's place, its length, caption's place, its length, whether JSON)."""
        found: dict[str, dict[str, tuple[int, int, str]]] = {}
        length = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                last = -1
                for member in tar:
                    if member.offset <= last or member.size < 0:  # tarfile would go round for ever
                        raise ValueError(f"{member.name} claims {member.size} bytes at {member.offset}")
                    last = member.offset
                    stem, _, kind = member.name.rpartition("/")[2].partition(".")
                    where = f"{path.name}: {member.name}"
                    kind = kind.lower()
                    sort = "picture" if kind in PICTURE_KINDS else "caption" if kind in CAPTION_KINDS else None
                    if member.isdir() or (member.isreg() and sort is None):
                        continue  # other things about the same sample are none of ours
                    if not member.isreg() or member.issparse():
                        self.problems.append(f"{where}: is no plain file")
                    elif member.size > LARGEST or member.offset_data + member.size > length:
                        self.problems.append(f"{where}: claims {member.size} bytes")
                    else:
                        key = member.name[: len(member.name) - len(kind) - 1] if stem else member.name
                        found.setdefault(key, {})[sort] = (member.offset_data, member.size, kind)
        except Exception as error:  # what reads a broken archive may raise anything
            raise ValueError(f"{path} is damaged or compressed ({error}); pack it again, as a plain .tar") from error
        rows = []
        for key, pair in found.items():
            if len(pair) < 2:
                self.problems.append(f"{path.name}: {key}: has no {'caption' if 'picture' in pair else 'picture'}")
            else:
                (at, count, _), (there, letters, kind) = pair["picture"], pair["caption"]
                rows.append((number, at, count, there, letters, kind == "json"))
        return rows

    def _read(self, index: int) -> tuple[Tensor, str]:
        """The picture of this number, (3, size, size) uint8, and its caption, or the next that can be read."""
        for step in range(100):
            number, at, count, there, letters, is_json = self._places[(index + step) % len(self)].tolist()
            try:
                with open(self.paths[number], "rb") as file:
                    file.seek(there)
                    caption = _caption(file.read(letters), bool(is_json))
                    file.seek(at)
                    return to_pixels(load_picture(io.BytesIO(file.read(count))), self.size), caption
            except BadRow as problem:
                said = f"{self.paths[number].name}, picture {(index + step) % len(self)}: {problem}"
                if said not in self.problems:
                    self.problems.append(said)
                    warnings.warn(f"{said}; the next one stands in for it", stacklevel=4)
        raise ValueError(f"100 pictures in a row cannot be read, the last {self.problems[-1]}: pack the shards again")


def _caption(data: bytes, is_json: bool) -> str:
    try:
        text = data.decode()
        if is_json:
            row = json.loads(text)
            text = row.get("text", row.get("caption")) if isinstance(row, dict) else None
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except (ValueError, AttributeError, RecursionError):
        text = None
    if not text or not text.strip():
        raise BadRow('has no caption: text in UTF-8, or JSON with "text" or "caption"')
    return text.strip()


def write_shards(dataset, folder: str | Path, count: int | None = None, per_shard: int = 1000) -> list[Path]:
    """Packs a dataset into shards that `Shards`, and WebDataset's readers, open.

    Args:
        dataset: anything with `batch(indices)`: pictures in [-1, 1] and captions.
        folder: made if it is missing; shards of these names in it are replaced.
        count: how many pictures, the first ones; None for all.
        per_shard: pictures in one file, at least 1.

    Returns:
        The files, `00000.tar` and so on: the same bytes for the same pictures.

    Raises:
        ValueError: per_shard is below 1, or there are no pictures.
        OSError: a shard cannot be written; those before it are whole.
    """
    count = len(dataset) if count is None else min(count, len(dataset))
    if per_shard < 1 or count < 1:
        raise ValueError(f"{count} pictures, {per_shard} a shard; expected at least 1 of each")
    paths = []
    for start in range(0, count, per_shard):
        paths.append(Path(folder) / f"{start // per_shard:05}.tar")
        write_atomically(paths[-1], partial(_pack, dataset, range(start, min(start + per_shard, count))))
    return paths


def _pack(dataset, numbers: range, path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in numbers:
            images, captions = dataset.batch([index])
            buffer = io.BytesIO()
            pixels = ((images[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(buffer, "PNG")
            for kind, data in (("png", buffer.getvalue()), ("txt", captions[0].encode())):
                member = tarfile.TarInfo(f"{index:09}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
