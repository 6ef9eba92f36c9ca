"""Pictures of pictures: a grid of images with a caption under each, and figures that say in words what they show.

Two things move, and only in a notebook that runs: `explore`, a picture under sliders, and `LiveCurve`, a loss while it falls.
"""

import base64
import html
import io
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence

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


class DescribedImage:
    """A picture for a notebook, with its alternative text: what it shows, for a reader who cannot see it.

    Args:
        picture: the picture; it is stored with at most 256 colours, which keeps notebooks small.
        alt: one or two sentences that say what is to be seen.

    Raises:
        ValueError: alt is empty.
    """

    def __init__(self, picture: Image.Image, alt: str):
        if not alt.strip():
            raise ValueError("alt is empty; say in a sentence what the figure shows")
        buffer = io.BytesIO()
        few = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}  # rare colours survive
        picture.convert("RGB").quantize(256, **few).save(buffer, "PNG", optimize=True)
        self.alt, self.width, self.png = " ".join(alt.split()), picture.width, buffer.getvalue()

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        return f'<img alt="{html.escape(self.alt)}" width="{self.width}" src="data:image/png;base64,{data}">'


def figure(fig, alt: str) -> DescribedImage:
    """Turns a matplotlib figure into a small picture with alternative text, and closes it.

    Args:
        fig: the matplotlib figure.
        alt: what is to be seen, in a sentence or two.

    Raises:
        ValueError: alt is empty.
    """
    import matplotlib.pyplot as plt  # here, because the rest of this module does without

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plt.close(fig)  # or the notebook would show it a second time, without its words
    return DescribedImage(Image.open(buffer), alt)


def show(images: Tensor, captions: list[str] | None = None, *, alt: str, columns: int = 6, side: int = 96) -> DescribedImage:
    """Pictures in rows, each over its caption, for a notebook.

    Args:
        images: (N, 3, H, W) in [0, 1], N > 0; of pictures x in [-1, 1] pass (x + 1) / 2.
        captions: N of them, or None for none.
        alt: what is to be seen, in a sentence or two.
        columns: pictures in a row.
        side: width of a picture, in pixels of the sheet.

    Raises:
        ValueError: alt is empty, there is not one caption for each picture, or images lie well outside [0, 1].
    """
    _check_range(images)
    return DescribedImage(caption_grid(images, captions or [""] * len(images), columns=columns, side=side), alt)


def show_rows(
    rows: Mapping[str, Tensor | Sequence[Tensor]], *, alt: str, titles: Sequence[str] = (), side: int = 96
) -> DescribedImage:
    """Rows of pictures, each with its name at the left, for a notebook: the same things in several versions.

    Args:
        rows: names, in order, and the pictures of each row: (N, 3, H, W), or N pictures (3, H, W), in [0, 1]; H and W may
            differ from row to row.
        alt: what is to be seen, in a sentence or two.
        titles: what stands above the columns, one for each, or nothing.
        side: width of a picture, in pixels of the sheet.

    Raises:
        ValueError: alt is empty, there are no rows, more or fewer titles than columns, or pictures lie well outside [0, 1].
    """
    columns = max((len(row) for row in rows.values()), default=0)
    if columns == 0 or (titles and len(titles) != columns):
        raise ValueError(f"{len(rows)} rows of at most {columns} pictures and {len(titles)} titles: expected a title a column")
    font, step, top = ImageFont.load_default(size=13), side + 6, 22 if titles else 4
    left = 14 + max(int(font.getlength(line)) for name in rows for line in name.split("\n"))
    sheet = Image.new("RGB", (left + step * columns, top + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        draw.text((left + j * step + side // 2, 11), title, fill="black", font=font, anchor="mm")
    for i, (name, row) in enumerate(rows.items()):
        y = top + i * step
        draw.text((left - 8, y + side // 2), name, fill="black", font=font, anchor="rm", align="right")
        for j, picture in enumerate(row):
            _check_range(picture)
            resample = Image.Resampling.LANCZOS if picture.shape[-1] > side else Image.Resampling.NEAREST
            sheet.paste(to_pil(picture).resize((side, side), resample), (left + j * step, y))
            draw.rectangle((left + j * step - 1, y - 1, left + j * step + side, y + side), outline=(200, 200, 200))
    return DescribedImage(sheet, alt)


def explore(draw: Callable[..., DescribedImage], **sliders) -> None:
    """Puts sliders over a picture, which is drawn anew whenever one of them is moved.

    A stored notebook keeps neither: let a cell follow that shows the same thing at a few places.

    Args:
        draw: called with the value of each slider, by its name.  It should be quick, and not be changed by cells that follow.
        sliders: widgets with a value; the name becomes the description where there is none.  Give `continuous_update=False`
            where a drawing takes longer than a blink.

    Raises:
        ValueError: there is no slider.
        ImportError: ipywidgets is not installed.
    """
    if not sliders:
        raise ValueError("no sliders; give at least one, such as t=ipywidgets.IntSlider(max=999)")
    import ipywidgets  # here, because it comes with the extra [notebooks]
    from IPython.display import display

    screen = ipywidgets.Output()

    def redraw(change: object = None) -> None:
        picture = draw(**{name: slider.value for name, slider in sliders.items()})
        screen.outputs = ()
        screen.append_display_data(picture)

    for name, slider in sliders.items():
        slider.description = slider.description or name
        slider.observe(redraw, names="value")
    display(*sliders.values(), screen)
    redraw()


class LiveCurve:
    """A curve that grows in a notebook while its values come in; what is stored is the finished one.

    Args:
        steps: how many values there will be.
        alt: what the finished curve shows, in a sentence or two.
        label: what the values are.
        seconds: from one drawing to the next, at least; a drawing takes about a tenth of one.

    Raises:
        ValueError: alt is empty, or steps is not positive.
        ImportError: IPython is not installed.
    """

    def __init__(self, steps: int, alt: str, label: str = "loss", seconds: float = 2.0):
        if steps < 1 or not alt.strip():
            raise ValueError(f"{steps} steps and the alternative text {alt!r}; expected at least one step, and a sentence")
        self.steps, self.alt, self.label, self.seconds = steps, alt, label, seconds
        self.values: list[float] = []
        self._handle, self._drawn_at = None, -float("inf")

    def add(self, value: float) -> None:
        """Takes the next value, and draws if the last drawing is some time ago or this is the last value."""
        self.values.append(value)
        if len(self.values) >= self.steps or time.monotonic() - self._drawn_at >= self.seconds:
            self._draw()

    def _draw(self) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        fig, axis = plt.subplots(figsize=(5.2, 2.6))
        window = max(1, self.steps // 20)
        smooth = [
            sum(part) / len(part) for k in range(len(self.values)) if (part := self.values[max(0, k + 1 - window) : k + 1])
        ]
        steps = range(1, len(self.values) + 1)
        axis.plot(steps, self.values, color="0.75", linewidth=1, label="each step")
        axis.plot(steps, smooth, label=f"mean of the last {window}")
        axis.set(xlabel="step", ylabel=self.label, xlim=(0, self.steps))
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        picture = figure(fig, alt=self.alt)
        if self._handle:
            self._handle.update(picture)
        else:
            self._handle = display(picture, display_id=True)
        self._drawn_at = time.monotonic()


def _check_range(images: Tensor) -> None:
    low, high = images.min().item(), images.max().item()
    if low < -0.4 or high > 1.4:
        raise ValueError(f"images run from {low:.2f} to {high:.2f}; expected [0, 1]: pass (images + 1) / 2, or clamp them")
