"""The command line: `python -m minildm demo | train | sample | doctor`."""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minildm import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed with a reason, 2 misused, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is kept: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library wrote
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minildm", description="Latent diffusion, small enough to read.")
    parser.add_argument("--version", action="version", version=f"minildm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a text-to-image model on Shapes from nothing, measure it, draw a sheet")
    train = commands.add_parser(
        "train", help="train on a dataset: shapes, emoji, mnist, fashion-mnist, cifar10, or your folder"
    )
    train.add_argument("dataset", help="a dataset's name, or a folder with pictures and metadata.jsonl")
    train.add_argument("--size", type=int, default=32, help="side of the pictures in pixels, a multiple of 8 (default: 32)")
    for command, out in ((demo, "out"), (train, "out/DATASET")):
        command.add_argument("--out", type=Path, help=f"folder for the results (default: {out})")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--vae-steps", type=int, help="steps of the first stage, the autoencoder")
        command.add_argument("--word-steps", type=int, help="steps of the text encoder")
        command.add_argument("--steps", type=int, help="steps of the second stage, the diffusion")
        command.add_argument("--pictures", type=int, help="how many pictures are encoded for the second stage (default: 20000)")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument("--judged", type=int, default=512, help="how many samples are judged (default: 512)")
    demo.set_defaults(run=_demo)
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="draw pictures from a caption")
    sample.add_argument("prompt")
    sample.add_argument("--model", default="out/model", help="a folder with a trained model (default: out/model)")
    sample.add_argument("--negative", default="", help="what to keep out of the picture")
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument(
        "--guidance", type=float, help="how strictly to obey; 1 is none (default: 7.5, and 3 for models trained here)"
    )
    sample.add_argument("--sampler", default="dpmpp_2m", help="ddim, ddpm, euler, heun or dpmpp_2m")
    sample.add_argument("--seed", type=int, help="the same seed draws the same picture (default: a new one each time)")
    sample.add_argument("--n", type=int, default=1, help="number of pictures")
    sample.add_argument("-o", "--out", type=Path, default=Path("out/sample.png"), help="picture to write")
    sample.set_defaults(run=_sample)

    commands.add_parser("doctor", help="say what this machine has and what is missing").set_defaults(run=_doctor)
    return parser


# ------------------------------------------------------------------------------------------------------------------ demo


def _demo(args: argparse.Namespace) -> None:
    """Shapes from nothing: train, judge the reconstructions (the ceiling), judge samples, write everything down."""
    import torch

    from minildm.metrics import caption_accuracy, load_judge
    from minildm.plot import caption_grid
    from minildm.shapes import Shapes

    out = args.out or Path("out")
    judge, about_judge = load_judge()
    pipe, times = _train_pipeline(args, Shapes(size=32, seed=args.seed), out)

    started = time.perf_counter()
    fresh = Shapes(size=32, seed=args.seed + 1_000).draw(range(args.judged))
    unseen = Shapes(size=32, seed=args.seed + 1_000, split="held_out").draw(range(-(-args.judged // 2)))
    restored = pipe.decode(pipe.encode(fresh.images / 2 + 0.5))
    figures = {"judge_on_real_pictures": float(about_judge["accuracy"])}
    pictures = {
        "reconstructions": (restored, fresh),
        "samples": (pipe(fresh.captions, seed=0, **SAMPLING), fresh),
        "held_out_samples": (pipe(unseen.captions, seed=0, **SAMPLING), unseen),
    }
    for name, (images, asked) in pictures.items():
        figures[name] = dataclasses.asdict(caption_accuracy(judge.read(images * 2 - 1), asked.attributes))
    times["evaluation_s"] = time.perf_counter() - started

    images = torch.cat([pictures["samples"][0][:18], pictures["held_out_samples"][0][:6]])
    captions = fresh.captions[:18] + [f"[never seen] {c}" for c in unseen.captions[:6]]
    _write(out / "demo.png", caption_grid(images, captions, columns=6).save)
    report = {"figures": figures, "times": times, "sampling": SAMPLING, "seed": args.seed, **_machine()}
    _write(out / "demo.json", lambda path: path.write_text(json.dumps(report, indent=1)))

    print(f"\ncaptions obeyed in every attribute, judged on {len(fresh.images)} new pictures:")
    for name in pictures:
        print(f"  {name.replace('_', ' '):18} {figures[name]['all_correct']:6.1%}")
    print(f"trained in {times['training_s'] / 60:.1f} minutes; look at {out / 'demo.png'}, and draw your own:")
    where = "" if out == Path("out") else f" --model {out / 'model'}"
    print(f'  python -m minildm sample "a large red star on a white background"{where}')


SAMPLING = {"steps": 20, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}  # what models trained here like best


def _train(args: argparse.Namespace) -> None:
    """Any captioned pictures: train, then draw originals over reconstructions over samples."""
    if args.dataset == "judge":
        return _train_judge(args)
    import torch

    from minildm.data import open_dataset
    from minildm.plot import caption_grid

    dataset = open_dataset(args.dataset, args.size)
    out = args.out or Path("out") / Path(args.dataset).name
    pipe, _ = _train_pipeline(args, dataset, out)
    picks = torch.randint(len(dataset), (12,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    real, captions = dataset.batch(picks)
    real = real / 2 + 0.5
    restored, drawn = pipe.decode(pipe.encode(real)), pipe(captions, seed=args.seed, **SAMPLING)
    labels = [f"{kind}: {c}" for kind in ("real", "restored", "sample") for c in captions]
    _write(out / "grid.png", caption_grid(torch.cat([real, restored, drawn]), labels, columns=12, side=96).save)
    print(f"real pictures, reconstructions and samples are in {out / 'grid.png'}; draw your own:")
    print(f'  python -m minildm sample "{captions[0]}" --model {out / "model"}')


def _train_pipeline(args: argparse.Namespace, dataset, out: Path):
    """Trains by the small recipe, saves the model under `out`, and says how long each stage took."""
    from minildm.pipeline import Pipeline
    from minildm.recipes import Recipe, train_parts
    from minildm.train import watch

    asked = {name: getattr(args, name) for name in ("vae_steps", "word_steps", "steps", "pictures")}
    for name, value in asked.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    recipe = Recipe.small(size=dataset.size, seed=args.seed, **{name: v for name, v in asked.items() if v is not None})
    checkpoints = out / "checkpoints"
    _claim(checkpoints, json.dumps({"dataset": dataset.name, **dataclasses.asdict(recipe)}, indent=1))
    times = {}

    def run(stage, name: str):
        started = time.perf_counter()
        result = watch(stage, name, quiet=args.quiet)
        times[f"{name}_s".replace(" ", "_")] = time.perf_counter() - started
        return result

    parts = train_parts(recipe, dataset, run, checkpoints)
    times["training_s"] = sum(times.values())
    pipe = Pipeline(*parts, recipe.prediction_type, recipe.spacing, dataset.size)
    pipe.save(out / "model")
    shutil.copy(checkpoints / "recipe.json", out / "model" / "recipe.json")
    shutil.rmtree(checkpoints)  # the model is whole: the next run begins anew
    return pipe, times


def _claim(checkpoints: Path, recipe: str) -> None:
    """Makes the folder for checkpoints, or makes sure that the unfinished run in it is the same as this one."""
    path = checkpoints / "recipe.json"
    if path.exists() and path.read_text() != recipe:
        raise ValueError(
            f"{checkpoints} holds an unfinished run of another recipe or dataset: repeat that command to finish it, "
            "give another --out, or delete the folder"
        )
    _write(path, lambda beside: beside.write_text(recipe))


def _train_judge(args: argparse.Namespace) -> None:
    """The classifier behind every caption accuracy: trains it and writes the file that the package ships."""
    import torch
    from safetensors.torch import save_file

    from minildm.metrics import Judge
    from minildm.recipes import judge_accuracy, train_judge
    from minildm.train import Fit, watch

    fit = Fit(steps=args.steps or 2500, lr=2e-3, batch_size=128, seed=args.seed, ema=0.99)
    torch.manual_seed(args.seed)
    judge = Judge(size=args.size).to(memory_format=torch.channels_last)
    watch(train_judge(judge, fit), "judge", quiet=args.quiet)
    tensors = {name: t.half().contiguous() for name, t in judge.state_dict().items()}
    judge.load_state_dict(tensors)  # judged as it will be shipped, in half precision
    about = {
        "recipe": f"python -m minildm train judge --size {args.size}",
        "fit": str(fit),
        "accuracy": str(judge_accuracy(judge)),
    }
    about |= {"judged_on": "4000 fresh renders of every combination, all attributes right", **_machine()}
    path = (args.out or Path("out/judge")) / f"judge-shapes{args.size}.safetensors"
    _write(path, lambda beside: save_file(tensors, beside, metadata=about))
    print(f"wrote {path}: all attributes right on {float(about['accuracy']):.2%} of real pictures")


# ------------------------------------------------------------------------------------------------------- sample, doctor


def _sample(args: argparse.Namespace) -> None:
    """Draws and writes one PNG; where several pictures are asked for, a sheet of them."""
    import minildm
    from minildm.plot import caption_grid, to_pil

    _check_writable(args.out)
    pipe = minildm.load(args.model)
    scale = args.guidance if args.guidance is not None else (7.5 if pipe.image_size > 64 else SAMPLING["guidance_scale"])
    images = pipe(
        args.prompt, args.negative, steps=args.steps, guidance_scale=scale, sampler=args.sampler, seed=args.seed, n=args.n
    )
    sheet = (
        to_pil(images[0]) if args.n == 1 else caption_grid(images, [""] * args.n, columns=4, side=max(128, images.shape[-1]))
    )
    _write(args.out, sheet.save)
    print(f"wrote {args.out}")


def _doctor(args: argparse.Namespace) -> None:
    """Prints versions, device, threads and fonts, and what is missing and how to get it."""
    import importlib.metadata
    import importlib.util

    import torch

    from minildm.data import find_emoji_font
    from minildm.train import best_device

    for key, value in _machine().items():
        print(f"{key:14} {value}")
    print(f"{'device':14} {best_device()}")
    print(f"{'threads':14} {torch.get_num_threads()} of {os.cpu_count()} processors")
    missing = []
    try:
        print(f"{'emoji font':14} {find_emoji_font()}")
    except FileNotFoundError as error:
        missing.append(f"emoji font: {error}")
    for package, extra in (("jupyter", "notebooks"), ("nbval", "notebooks"), ("diffusers", "test"), ("nbgrader", "class")):
        if importlib.util.find_spec(package):
            print(f"{package:14} {importlib.metadata.version(package)}")
        else:
            missing.append(f"{package}: pip install 'minildm[{extra}]'")
    print("missing, and only needed for some things:" if missing else "nothing is missing")
    for line in missing:
        print(f"  {line}")


def _machine() -> dict[str, str]:
    """What a figure needs beside it to mean something."""
    import resource

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "minildm": __version__, "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
        "processor": _processor(), "peak_memory": f"{peak / 2**30:.2f} GiB",
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _check_writable(path: Path) -> None:
    """Fails now, not after minutes of work."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"cannot write {path}: use a name that ends in .png, .jpg or .webp")
    _write(path.with_name(f".{path.name}.try"), lambda beside: beside.write_bytes(b""))
    path.with_name(f".{path.name}.try").unlink()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    from minildm.checkpoint import write_atomically

    write_atomically(path, write)


if __name__ == "__main__":
    sys.exit(main())
