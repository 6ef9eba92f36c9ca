"""Pictures of pictures: a grid of images with a caption under each."""

import textwrap

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """One picture (3, H, W) in [0, 1] as a Pillow image."""
    return Image.fromarray((rearrange(image, "c h w -> h w c").clamp(0, 1) * 255).round().byte().cpu().numpy())


def caption_grid(images: Tensor, captions: list[str], columns: int = 6, side: int = 144) -> Image.Image:
    """Lays pictures out in rows, each over its caption.

    Args:
        images: (N, 3, H, W) in [0, 1], N > 0.
        captions: N of them; "" for none.  Long ones are wrapped, and cut after five lines.
        columns: pictures in a row.
        side: width of a picture on the sheet, in pixels.

    Raises:
        ValueError: there are no pictures, or not one caption for each.
    """
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: expected one for each, and at least one")
    font = ImageFont.load_default(size=12)
    wrapped = [textwrap.wrap(caption, width=side // 6, max_lines=5, placeholder=" …") for caption in captions]
    text_height = 16 * max(len(lines) for lines in wrapped)
    margin, rows = 12, -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (margin + columns * (side + margin), margin + rows * (side + text_height + margin))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = margin + k % columns * (side + margin), margin + k // columns * (side + text_height + margin)
        whole = side % image.shape[-1] == 0
        sheet.paste(to_pil(image).resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
        for row, line in enumerate(lines):
            draw.text((x, y + side + 2 + 16 * row), line, fill=(40, 40, 40), font=font)
    return sheet
