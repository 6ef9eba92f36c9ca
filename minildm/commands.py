"""What the commands `sample`, `judge` and `doctor` do."""

import argparse
import importlib.metadata
import os
from pathlib import Path

from minildm.machine import machine

# Options of `sample` that say nothing without another.
GO_TOGETHER = {
    "strength": "image", "mask": "image", "control": "hint", "hint": "control", "control_scale": "control",
    "lora_scale": "lora",
}  # fmt: skip


def run_sample(args: argparse.Namespace) -> None:
    """Draws and writes one PNG; where several pictures are asked for, a sheet of them."""
    import minildm
    from minildm.checkpoint import write_atomically
    from minildm.plot import caption_grid, to_pil

    _check_writable(args.out)
    for option, other in GO_TOGETHER.items():
        if getattr(args, option) is not None and getattr(args, other) is None:
            raise ValueError(f"--{option.replace('_', '-')} goes with --{other}: give both, or neither")
    pipe = minildm.load(args.model, vocabulary=args.vocabulary, prediction_type=args.prediction_type)
    images = pipe(
        args.prompt,
        args.negative,
        steps=args.steps,
        guidance_scale=args.guidance,
        sampler=args.sampler,
        seed=args.seed,
        n=args.n,
        **_beside_the_prompt(args, pipe),
    )
    sheet = (
        to_pil(images[0]) if args.n == 1 else caption_grid(images, [""] * args.n, columns=4, side=max(128, images.shape[-1]))
    )
    write_atomically(args.out, sheet.save)
    print(f"wrote {args.out}")


def _beside_the_prompt(args: argparse.Namespace, pipe) -> dict:
    """What else the pipeline is called with; an adapter is added to its networks."""
    from minildm.adapters import read_controlnet
    from minildm.lora import set_scale
    from minildm.lora_files import read_lora

    given = {name: getattr(args, name) for name in ("strength", "control_scale") if getattr(args, name) is not None}
    if args.image:
        given["image"] = _picture(args.image, pipe.image_size)
    if args.mask:
        given["mask"] = (_picture(args.mask, pipe.image_size).mean(dim=1, keepdim=True) >= 0.5).float()
    if args.control:
        given["control"] = read_controlnet(args.control, pipe.device, pipe.dtype)
        given["hint"] = _picture(args.hint, pipe.image_size)[:, : given["control"].hint_channels]
    if args.lora:
        for part in read_lora(args.lora, pipe.unet, pipe.text):
            set_scale(pipe.unet if part == "unet" else pipe.text, 1.0 if args.lora_scale is None else args.lora_scale)
    return given


def _picture(path: Path, size: int):
    """A picture's central square, (1, 3, size, size) in [0, 1]."""
    from minildm.folder import BadRow, load_picture, to_pixels

    try:
        return to_pixels(load_picture(path), size)[None] / 255
    except BadRow as problem:
        raise ValueError(f"{path} {problem}") from None


def run_judge(args: argparse.Namespace) -> None:
    """The classifier behind every caption accuracy: trains it and writes the file that the package ships."""
    import torch
    from safetensors.torch import save_file

    from minildm.checkpoint import write_atomically
    from minildm.metrics import Judge, judge_file
    from minildm.recipes import judge_accuracy, train_judge
    from minildm.train import Fit, watch

    fit = Fit(steps=args.steps, lr=2e-3, batch_size=128, seed=args.seed, ema=0.99)
    torch.manual_seed(args.seed)
    judge = Judge(size=args.size, objects=args.objects).to(memory_format=torch.channels_last)
    watch(train_judge(judge, fit), "judge", quiet=args.quiet)
    tensors = {name: t.half().contiguous() for name, t in judge.state_dict().items()}
    judge.load_state_dict(tensors)  # judged as it will be shipped, in half precision
    options = f"--size {args.size} --objects {args.objects} --steps {args.steps} --seed {args.seed}"
    about = {
        "recipe": f"python -m minildm judge {options}", "fit": str(fit), "accuracy": str(judge_accuracy(judge)),
        "judged_on": "4000 fresh renders of every combination, all attributes right", **machine(),
    }  # fmt: skip
    path = args.out / judge_file(args.size, args.objects)
    write_atomically(path, lambda beside: save_file(tensors, beside, metadata=about))
    print(f"wrote {path}: all attributes right on {float(about['accuracy']):.2%} of real pictures")


def run_doctor(args: argparse.Namespace) -> None:
    """Prints versions, device, threads and fonts, and what is missing and how to get it."""
    import torch

    from minildm.data import find_emoji_font
    from minildm.machine import best_device

    for key, value in machine().items():
        print(f"{key:14} {value}")
    print(f"{'device':14} {best_device()}")
    print(f"{'threads':14} {torch.get_num_threads()} of {os.cpu_count()} processors")
    missing = []
    try:
        print(f"{'emoji font':14} {find_emoji_font()}")
    except FileNotFoundError as error:
        missing.append(f"emoji font: {error}")
    for package, extra in (("jupyter", "notebooks"), ("nbval", "notebooks"), ("diffusers", "test"), ("nbgrader", "class")):
        try:
            print(f"{package:14} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{package}: pip install 'minildm[{extra}]'")
    print("missing, and only needed for some things:" if missing else "nothing is missing")
    print("".join(f"  {line}\n" for line in missing), end="")


def _check_writable(path: Path) -> None:
    """Fails now, not after minutes of work; leaves nothing behind."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"cannot write {path}: use a name that ends in .png, .jpg or .webp")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f".{path.name}.try")
        trial.touch()
        trial.unlink()
    finally:
        for folder in missing:
            if folder.exists():
                folder.rmdir()
