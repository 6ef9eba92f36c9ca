"""The command line: `python -m minildm demo | train | sample | ship | judge | doctor`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from minildm import __version__
from minildm.commands import run_doctor, run_judge, run_sample
from minildm.trainings import run_demo, run_ship, run_train


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed with a reason, 2 misused, 130 interrupted."""
    args, rank = _parser().parse_args(argv), os.environ.get("RANK", "0")  # torchrun's number of this process
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: rank == "0" and print("warning:", message, file=sys.stderr)
            args.run(args)
    except KeyboardInterrupt:
        if rank == "0":
            print("\nstopped" + getattr(args, "if_stopped", ""), file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        where = "" if rank == "0" else f" in process {rank}"
        print(f"error{where}:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library wrote
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
    for command, out, run in ((demo, "out", run_demo), (train, "out/DATASET", run_train)):
        command.add_argument("--out", type=Path, help=f"folder for the results (default: {out})")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--vae-steps", type=_at_least_one, help="steps of the first stage, the autoencoder")
        command.add_argument("--word-steps", type=_at_least_one, help="steps of the text encoder")
        command.add_argument("--steps", type=_at_least_one, help="steps of the second stage, the diffusion")
        command.add_argument(
            "--pictures", type=_at_least_one, help="how many are encoded for the second stage (default: 20000)"
        )
        command.add_argument(
            "--save-every", type=_at_least_one, default=500, help="steps from one checkpoint to the next (default: 500)"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        large = command.add_argument_group("for larger runs", "torchrun --nproc-per-node N -m minildm ... shares every batch")
        large.add_argument(
            "--parallel", choices=("ddp", "fsdp"), default="ddp",
            help="whether each process holds all of the U-Net, or a part of each of its tensors (default: ddp)",
        )  # fmt: skip
        large.add_argument(
            "--accumulate", type=_at_least_one, default=1, metavar="N",
            help="take each process's share of a batch in N parts, one after the other (not for the text encoder)",
        )  # fmt: skip
        large.add_argument(
            "--recompute", action="store_true", help="compute the U-Net's activations twice, and do not keep them"
        )
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
    edit = sample.add_argument_group("beside the prompt", "pictures are cut to their central square and resized to the model's")
    edit.add_argument("--image", type=Path, help="a picture to start from")
    edit.add_argument("--strength", type=float, help="how far to go from it, 0 to 1 (default: 0.8)")
    edit.add_argument("--mask", type=Path, help="what of it to repaint: white is repainted, black is kept")
    edit.add_argument("--control", type=Path, help="a ControlNet for the model: a diffusers folder, or a file")
    edit.add_argument("--hint", type=Path, help="the picture that it is shown: edges, a pose")
    edit.add_argument("--control-scale", type=float, help="how strongly it speaks (default: 1)")
    edit.add_argument("--lora", type=Path, help="an adapter for the model: a file of kohya's or diffusers', or peft's folder")
    edit.add_argument("--lora-scale", type=float, help="how much of it to use (default: 1)")
    sample.add_argument("-o", "--out", type=Path, default=Path("out/sample.png"), help="picture to write")
    sample.set_defaults(run=run_sample)

    ship = commands.add_parser("ship", help="make a model that comes with the package anew")
    ship.add_argument("name", choices=["shapes32", "shapes64", "emoji"])
    ship.add_argument("--seed", type=int, default=0)
    ship.add_argument("--judged", type=_at_least_one, default=512, help="how many samples are judged (default: 512)")
    ship.add_argument("--out", type=Path, help="folder for the result (default: out/ship)")
    ship.add_argument("--quiet", action="store_true", help="no progress bars")
    ship.set_defaults(run=run_ship, parallel="ddp", accumulate=1, recompute=False)
    ship.set_defaults(if_stopped="; the same command goes on from the last checkpoint")

    judge = commands.add_parser("judge", help="train the classifier that says whether a Shapes picture obeys its caption")
    judge.add_argument("--size", type=int, default=32, help="side of its pictures in pixels (default: 32)")
    judge.add_argument("--objects", type=int, default=1, choices=(1, 2), help="objects in its pictures (default: 1)")
    judge.add_argument("--steps", type=_at_least_one, default=1500)
    judge.add_argument("--seed", type=int, default=0)
    judge.add_argument("--out", type=Path, default=Path("out/judge"), help="folder for the result (default: out/judge)")
    judge.add_argument("--quiet", action="store_true", help="no progress bar")
    judge.set_defaults(run=run_judge)

    commands.add_parser("doctor", help="say what this machine has and what is missing").set_defaults(run=run_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
