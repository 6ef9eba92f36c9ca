"""Pictures in tar files: the same as in memory, whatever else the archive holds, and nothing of it is unpacked."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from minildm.data import open_dataset
from minildm.shapes import Shapes
from minildm.shards import Shards, write_shards


def png(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, files: list[tuple[str, bytes]], *odd: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in odd:
            tar.addfile(member)
    return path.parent


def special(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def test_what_was_packed_comes_back_in_any_order(tmp_path):
    shapes = Shapes(size=32)
    paths = write_shards(shapes, tmp_path, count=7, per_shard=3)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    again = write_shards(shapes, tmp_path / "again", count=7, per_shard=3)
    assert [a.read_bytes() for a in again] == [path.read_bytes() for path in paths]
    shards = Shards(tmp_path, size=32)
    assert (len(shards), shards.size, shards.name, shards.problems) == (7, 32, tmp_path.name, [])
    images, captions = shards.batch(torch.tensor([5, 0, 6, 5]))
    wanted, said = shapes.batch([5, 0, 6, 5])
    assert captions == said
    torch.testing.assert_close(images, wanted, atol=0.5 / 127.5 + 1e-6, rtol=0)
    assert isinstance(open_dataset(tmp_path, size=16), Shards)
    image, caption = shards[3]
    assert (tuple(image.shape), caption) == ((3, 32, 32), shapes.batch([3])[1][0])
    for index in (-1, 7):
        with pytest.raises(IndexError, match=r"outside \[0, 7\)"):
            shards.batch([index])


def test_both_kinds_of_caption_folders_and_other_things_beside(tmp_path):
    files = [
        ("a/1.png", png()), ("a/1.json", b'{"caption": " one ", "x": 3}'), ("a/1.cls", b"7"), ("b/1.JPG.part", b""),
        ("b/1.png", png((0, 0, 255))), ("b/1.txt", "zwei ü".encode()), ("2.png", png()), ("2.json", b'{"text": "three"}'),
    ]  # fmt: skip
    shards = Shards(pack(tmp_path / "x.tar", files, special("c", tarfile.DIRTYPE)), size=8)
    images, captions = shards.batch(range(3))
    assert captions == ["one", "zwei ü", "three"]
    assert images[1, 2].min() > 0.9
    assert shards.problems == []


def test_links_and_lonely_files_are_left_out_and_nothing_is_unpacked(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    files = [
        ("../../1.png", png()),
        ("../../1.txt", b"inside"),
        ("/etc/2.png", png()),
        ("/etc/2.txt", b"two"),
        ("3.png", png()),
    ]
    odd = [
        special("4.png", tarfile.SYMTYPE, str(secret)), special("5.png", tarfile.LNKTYPE, "../../1.png"),
        special("6.png", tarfile.CHRTYPE), special("7.txt", tarfile.FIFOTYPE),
    ]  # fmt: skip
    folder = pack(tmp_path / "shards" / "x.tar", files, *odd)
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="left out 5, first x.tar: 4.png: is no plain file"):
        shards = Shards(folder, size=8)
    assert shards.batch(range(2))[1] == ["inside", "two"]
    assert shards.problems[-1] == "x.tar: 3: has no caption"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_picture_is_named_and_the_next_stands_in(tmp_path):
    files = [
        ("1.png", png()[:40]),
        ("1.txt", b"broken"),
        ("2.png", png()),
        ("2.txt", b"\xff"),
        ("3.png", png()),
        ("3.txt", b"good"),
    ]
    shards = Shards(pack(tmp_path / "x.tar", files), size=8)
    with pytest.warns(UserWarning, match="the next one stands in for it"):
        assert shards.batch([0])[1] == ["good"]
    assert [said[:17] for said in shards.problems] == ["x.tar, picture 0:", "x.tar, picture 1:"]
    assert shards.batch([0, 1, 2])[1] == ["good"] * 3  # said once
    only = Shards(pack(tmp_path / "bad" / "x.tar", files[:2]), size=8)
    with pytest.warns(UserWarning, match="stands in"), pytest.raises(ValueError, match="100 pictures in a row cannot be read"):
        only.batch([0])


def test_headers_that_lie_cost_no_memory(tmp_path, monkeypatch):
    folder = pack(tmp_path / "x.tar", [("1.png", png()), ("1.txt", b"good"), ("2.png", bytes(3000)), ("2.txt", b"large")])
    monkeypatch.setattr("minildm.shards.LARGEST", 2000)
    with pytest.warns(UserWarning, match="left out 2, first x.tar: 2.png: claims 3000 bytes"):
        assert Shards(folder, size=8).batch([0])[1] == ["good"]
    member = tarfile.TarInfo("3.png")
    member.size = 2**40
    (folder / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(ValueError, match="is damaged or compressed"):
        Shards(folder, size=8)


def test_what_is_no_set_of_shards_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .tar in .*; a shard holds pairs"):
        Shards(tmp_path, size=8)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="is damaged or compressed"):
        Shards(tmp_path, size=8)
    with pytest.raises(ValueError, match="its shards are empty"):
        Shards(pack(tmp_path / "empty" / "x.tar", []), size=8)
    with pytest.raises(ValueError, match="size is 0"):
        Shards(tmp_path, size=0)
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        write_shards(Shapes(), tmp_path, count=0)
