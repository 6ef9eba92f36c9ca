"""The command line: `python -m minildm demo | train | sample | ship | judge | doctor`."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

from minildm import __version__
from minildm.machine import machine, python


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed with a reason, 2 misused, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print("warning:", message, file=sys.stderr)
            args.run(args)
    except KeyboardInterrupt:
        print("\nstopped" + getattr(args, "if_stopped", ""), file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library wrote
        return 1
    return 0


def _at_least_one(text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; expected a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minildm", description="Latent diffusion, small enough to read.")
    parser.add_argument("--version", action="version", version=f"minildm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a text-to-image model on Shapes from nothing, measure it, draw a sheet")
    demo.add_argument("--judged", type=_at_least_one, default=512, help="how many samples are judged (default: 512)")
    train = commands.add_parser(
        "train", help="train on a dataset: shapes, emoji, mnist, fashion-mnist, cifar10, or your folder"
    )
    train.add_argument("dataset", help="a dataset's name, or a folder with pictures and metadata.jsonl")
    train.add_argument("--size", type=int, default=32, help="side of the pictures in pixels, a multiple of 8 (default: 32)")
    for command, out, run in ((demo, "out", _demo), (train, "out/DATASET", _train)):
        command.add_argument("--out", type=Path, help=f"folder for the results (default: {out})")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--vae-steps", type=_at_least_one, help="steps of the first stage, the autoencoder")
        command.add_argument("--word-steps", type=_at_least_one, help="steps of the text encoder")
        command.add_argument("--steps", type=_at_least_one, help="steps of the second stage, the diffusion")
        command.add_argument(
            "--pictures", type=_at_least_one, help="how many are encoded for the second stage (default: 20000)"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.set_defaults(run=run, if_stopped="; the same command goes on from the last checkpoint")

    sample = commands.add_parser("sample", help="draw pictures from a caption")
    sample.add_argument("prompt")
    sample.add_argument("--model", default="out/model", help="a trained model: a folder, a file or a name (default: out/model)")
    sample.add_argument("--vocabulary", help="CLIP's, for a model in a single file (default: looked for beside it)")
    sample.add_argument("--prediction-type", help="epsilon or v_prediction, for a model in a single file (default: guessed)")
    sample.add_argument("--negative", default="", help="what to keep out of the picture")
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance", type=float, help="how strictly to obey; 1 is none (default: what the model likes best)")
    sample.add_argument("--sampler", default="dpmpp_2m", help="ddim, ddpm, euler, heun or dpmpp_2m")
    sample.add_argument("--seed", type=int, help="the same seed draws the same picture (default: a new one each time)")
    sample.add_argument("--n", type=int, default=1, help="number of pictures")
    sample.add_argument("-o", "--out", type=Path, default=Path("out/sample.png"), help="picture to write")
    sample.set_defaults(run=_sample)

    ship = commands.add_parser("ship", help="make a model that comes with the package anew")
    ship.add_argument("name", choices=["shapes32", "shapes64"])
    ship.add_argument("--seed", type=int, default=0)
    ship.add_argument("--judged", type=_at_least_one, default=512, help="how many samples are judged (default: 512)")
    ship.add_argument("--out", type=Path, help="folder for the result (default: out/ship)")
    ship.add_argument("--quiet", action="store_true", help="no progress bars")
    ship.set_defaults(run=_ship, if_stopped="; the same command goes on from the last checkpoint")

    judge = commands.add_parser("judge", help="train the classifier that says whether a Shapes picture obeys its caption")
    judge.add_argument("--size", type=int, default=32, help="side of its pictures in pixels (default: 32)")
    judge.add_argument("--objects", type=int, default=1, choices=(1, 2), help="objects in its pictures (default: 1)")
    judge.add_argument("--steps", type=_at_least_one, default=1500)
    judge.add_argument("--seed", type=int, default=0)
    judge.add_argument("--out", type=Path, default=Path("out/judge"), help="folder for the result (default: out/judge)")
    judge.add_argument("--quiet", action="store_true", help="no progress bar")
    judge.set_defaults(run=_judge)

    commands.add_parser("doctor", help="say what this machine has and what is missing").set_defaults(run=_doctor)
    return parser


# --------------------------------------------------------------------------------------------------------- demo, train and ship


def _demo(args: argparse.Namespace) -> None:
    """Shapes from nothing: train, judge the reconstructions (the ceiling), judge samples, write everything down."""
    import torch

    from minildm.checkpoint import write_atomically
    from minildm.plot import caption_grid
    from minildm.shapes import Shapes
    from minildm.shipped import measure

    out = args.out or Path("out")
    pipe, _, times, _ = _train_pipeline(args, Shapes(size=32, seed=args.seed), _recipe(args, size=32), out)
    start = time.perf_counter()
    figures, pictures = measure(pipe, args.judged, args.seed)
    times["evaluation_s"] = time.perf_counter() - start

    (drawn, fresh), (drawn_unseen, unseen) = pictures["samples"], pictures["held_out_samples"]
    captions = fresh.captions[:18] + [f"[never seen] {c}" for c in unseen.captions[:6]]
    sheet = caption_grid(torch.cat([drawn[:18], drawn_unseen[:6]]), captions, columns=6)
    write_atomically(out / "demo.png", sheet.save)
    report = {"figures": figures, "times": times, "guidance_scale": pipe.guidance_scale, "seed": args.seed, **machine()}
    write_atomically(out / "demo.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    shutil.rmtree(out / "checkpoints")  # all is written: the next run begins anew

    print(f"\ncaptions obeyed in every attribute, judged on {len(fresh.images)} new pictures:")
    for name in pictures:
        print(f"  {name.replace('_', ' '):18} {figures[name]['all_correct']:6.1%}")
    print(f"trained in {times['training_s'] / 60:.1f} minutes; look at {out / 'demo.png'}, and draw your own:")
    where = "" if out == Path("out") else f" --model {out / 'model'}"
    print(f'  {python()} -m minildm sample "a large red star in the center on a white background"{where}')


def _train(args: argparse.Namespace) -> None:
    """Any captioned pictures: train, then draw originals over reconstructions over samples."""
    import torch

    from minildm.checkpoint import write_atomically
    from minildm.data import open_dataset
    from minildm.plot import caption_grid

    dataset = open_dataset(args.dataset, args.size)
    out = args.out or Path("out") / Path(args.dataset).resolve().name
    pipe, *_ = _train_pipeline(args, dataset, _recipe(args, dataset.size), out)
    picks = torch.randint(len(dataset), (12,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    real, captions = dataset.batch(picks)
    real = real / 2 + 0.5
    restored, drawn = pipe.decode(pipe.encode(real)), pipe(captions, seed=args.seed)
    labels = [f"{kind}: {c}" for kind in ("real", "restored", "sample") for c in captions]
    write_atomically(out / "grid.png", caption_grid(torch.cat([real, restored, drawn]), labels, columns=12, side=96).save)
    shutil.rmtree(out / "checkpoints")
    print(f"real pictures, reconstructions and samples are in {out / 'grid.png'}; draw your own:")
    print(f'  {python()} -m minildm sample "{captions[0]}" --model {out / "model"}')


def _ship(args: argparse.Namespace) -> None:
    """Makes a model that comes with the package anew, as it is in minildm/weights."""
    from minildm.shipped import MODELS, halve, measure, ship

    out = args.out or Path("out/ship")
    dataset, recipe = MODELS[args.name](args.seed)
    pipe, clip, _, described = _train_pipeline(args, dataset, recipe, out)
    halve(pipe.unet, pipe.vae, pipe.text)
    figures, _ = measure(pipe, args.judged, args.seed, dataset.objects)
    ship(pipe, clip, out / args.name, f"python -m minildm ship {args.name} --seed {args.seed}", described, figures)
    shutil.rmtree(out / "checkpoints")
    print(f"wrote {out / args.name}; captions obeyed in every attribute: {figures['samples']['all_correct']:.1%}")


def _recipe(args: argparse.Namespace, size: int):
    from minildm.recipes import Recipe

    asked = {name: getattr(args, name) for name in ("vae_steps", "word_steps", "steps", "pictures")}
    return Recipe.small(size=size, seed=args.seed, **{k: v for k, v in asked.items() if v is not None})


def _train_pipeline(args: argparse.Namespace, dataset, recipe, out: Path):
    """Trains by a recipe, saves the model under `out` and reads it back.

    Returns the pipeline, what its text encoder was trained in, how long each stage took, and all choices as text.

    What is measured afterwards is what lies on the disk.  Checkpoints are left for the caller to delete when all is written.
    """
    from minildm.checkpoint import write_atomically
    from minildm.pipeline import Pipeline
    from minildm.recipes import train_parts
    from minildm.train import watch

    checkpoints, origin = out / "checkpoints", getattr(args, "dataset", "shapes")
    origin = str(Path(origin).resolve()) if Path(origin).exists() else origin
    described = json.dumps({"dataset": origin, "dataset_size": len(dataset), **dataclasses.asdict(recipe)}, indent=1)
    _claim(checkpoints / "recipe.json", described)
    clock = checkpoints / "times.json"  # what earlier, interrupted runs of the same command have spent
    times = json.loads(clock.read_text()) if clock.exists() else {}

    def run(stage, label: str):
        started, name = time.perf_counter(), f"{label.replace(' ', '_')}_s"
        try:
            return watch(stage, label, quiet=args.quiet)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - started
            write_atomically(clock, lambda path: path.write_text(json.dumps(times)))

    *parts, clip = train_parts(recipe, dataset, run, checkpoints)
    pipe = Pipeline(*parts, recipe.prediction_type, recipe.spacing, recipe.size, guidance_scale=recipe.guidance_scale)
    pipe.save(out / "model")
    write_atomically(out / "model" / "recipe.json", lambda path: path.write_text(described))
    return Pipeline.load(out / "model"), clip, {**times, "training_s": sum(times.values())}, described


def _claim(path: Path, described: str) -> None:
    """Makes the folder for checkpoints, or makes sure that the unfinished run in it is the same as this one."""
    from minildm.checkpoint import write_atomically

    if path.exists() and path.read_text() != described:
        raise ValueError(
            f"{path.parent} holds an unfinished run of another recipe or dataset: repeat that command to finish it, "
            "give another --out, or delete the folder"
        )
    write_atomically(path, lambda beside: beside.write_text(described))


# -------------------------------------------------------------------------------------------------- sample, judge, doctor


def _sample(args: argparse.Namespace) -> None:
    """Draws and writes one PNG; where several pictures are asked for, a sheet of them."""
    import minildm
    from minildm.checkpoint import write_atomically
    from minildm.plot import caption_grid, to_pil

    _check_writable(args.out)
    pipe = minildm.load(args.model, vocabulary=args.vocabulary, prediction_type=args.prediction_type)
    images = pipe(
        args.prompt,
        args.negative,
        steps=args.steps,
        guidance_scale=args.guidance,
        sampler=args.sampler,
        seed=args.seed,
        n=args.n,
    )
    sheet = (
        to_pil(images[0]) if args.n == 1 else caption_grid(images, [""] * args.n, columns=4, side=max(128, images.shape[-1]))
    )
    write_atomically(args.out, sheet.save)
    print(f"wrote {args.out}")


def _judge(args: argparse.Namespace) -> None:
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


def _doctor(args: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
