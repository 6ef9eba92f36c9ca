"""What the commands `demo`, `train` and `ship` do: train by a recipe, save, and show what came of it.

Started by `torchrun`, all processes train, and the first of them does the rest: it alone writes, prints and shows bars.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

from minildm.machine import machine, python

DEMO = {"size": 32, "context_length": 20}  # no caption of one object is longer
PATIENT = {"vae_steps": 1200, "word_steps": 250, "steps": 4000}  # for pictures that are not as plain as Shapes


def run_demo(args: argparse.Namespace) -> None:
    """Shapes from nothing: train, judge the reconstructions (the ceiling), judge samples, write everything down."""
    import torch

    from minildm.checkpoint import write_atomically
    from minildm.plot import caption_grid
    from minildm.shapes import Shapes
    from minildm.shipped import measure

    out = args.out or Path("out")
    trained = _pipeline(args, Shapes(size=DEMO["size"], seed=args.seed), _recipe(args, **DEMO), out)
    if trained is None:
        return
    pipe, _, times, _ = trained
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


def run_train(args: argparse.Namespace) -> None:
    """Any captioned pictures: train, then draw originals over reconstructions over samples."""
    import torch

    from minildm.checkpoint import write_atomically
    from minildm.data import open_dataset
    from minildm.plot import caption_grid

    dataset = open_dataset(args.dataset, args.size)
    out = args.out or Path("out") / Path(args.dataset).resolve().name
    trained = _pipeline(args, dataset, _recipe(args, size=dataset.size, **PATIENT), out)
    if trained is None:
        return
    pipe, *_ = trained
    picks = torch.randint(len(dataset), (12,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    real, captions = dataset.batch(picks)
    real = real / 2 + 0.5
    restored, drawn = pipe.decode(pipe.encode(real)), pipe(captions, seed=args.seed)
    labels = [f"{kind}: {c}" for kind in ("real", "restored", "sample") for c in captions]
    write_atomically(out / "grid.png", caption_grid(torch.cat([real, restored, drawn]), labels, columns=12, side=96).save)
    shutil.rmtree(out / "checkpoints")
    print(f"real pictures, reconstructions and samples are in {out / 'grid.png'}; draw your own:")
    print(f'  {python()} -m minildm sample "{captions[0]}" --model {out / "model"}')


def run_ship(args: argparse.Namespace) -> None:
    """Makes a model that comes with the package anew, as it is in minildm/weights."""
    from minildm.shapes import Shapes
    from minildm.shipped import MODELS, halve, measure, measure_copies, ship

    out = args.out or Path("out/ship")
    dataset, recipe = MODELS[args.name](args.seed)
    trained = _pipeline(args, dataset, recipe, out)
    if trained is None:
        return
    pipe, clip, _, described = trained
    halve(pipe.unet, pipe.vae, pipe.text)
    if isinstance(dataset, Shapes):
        figures, _ = measure(pipe, args.judged, args.seed, dataset.objects)
        said = f"captions obeyed in every attribute: {figures['samples']['all_correct']:.1%}"
    else:
        figures, _ = measure_copies(pipe, dataset, args.judged, args.seed)
        said = f"learned by heart: {figures['nearest_is_its_own']:.1%}"
    ship(pipe, clip, out / args.name, f"python -m minildm ship {args.name} --seed {args.seed}", described, figures)
    shutil.rmtree(out / "checkpoints")
    print(f"wrote {out / args.name}; {said}")


def _recipe(args: argparse.Namespace, **choices: int):
    from minildm.recipes import Recipe

    asked = {name: getattr(args, name) for name in ("vae_steps", "word_steps", "steps", "pictures")}
    recipe = Recipe.small(seed=args.seed, **(choices | {k: v for k, v in asked.items() if v is not None}))
    return _in_every_stage(recipe, ("first", "words", "second"), save_every=args.save_every)


def _in_every_stage(recipe, stages: tuple[str, ...], **settings: int):
    """The recipe with other settings of these stages' `Fit`."""
    return dataclasses.replace(recipe, **{s: dataclasses.replace(getattr(recipe, s), **settings) for s in stages})


def _pipeline(args: argparse.Namespace, dataset, recipe, out: Path):
    """Trains by a recipe, saves the model under `out` and reads it back.

    Returns the pipeline, what its text encoder was trained in, how long each stage took, and all choices as text; in all
    processes but the first, None.

    What is measured afterwards is what lies on the disk.  Checkpoints are left for the caller to delete when all is written.
    """
    from minildm.checkpoint import write_atomically
    from minildm.distributed import join, leave
    from minildm.pipeline import Pipeline
    from minildm.recipes import train_parts
    from minildm.train import watch

    world = join()
    checkpoints, origin = out / "checkpoints", getattr(args, "dataset", dataset.name)
    origin = str(Path(origin).resolve()) if Path(origin).exists() else origin
    described = json.dumps({"dataset": origin, "dataset_size": len(dataset), **dataclasses.asdict(recipe)}, indent=1)
    _claim(checkpoints / "recipe.json", described, writes=world.rank == 0)
    clock = checkpoints / "times.json"  # what earlier, interrupted runs of the same command have spent
    times = json.loads(clock.read_text()) if world.rank == 0 and clock.exists() else {}

    def run(stage, label: str):
        started, name = time.perf_counter(), f"{label.replace(' ', '_')}_s"
        try:
            return watch(stage, label, quiet=args.quiet or world.rank > 0)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - started
            if world.rank == 0:
                write_atomically(clock, lambda path: path.write_text(json.dumps(times)))

    recipe = _in_every_stage(recipe, ("first", "second"), accumulate=args.accumulate)  # may change midway
    *parts, clip = train_parts(recipe, dataset, run, checkpoints, world, args.parallel, args.recompute)
    leave()
    if world.rank > 0:
        return None
    pipe = Pipeline(*parts, recipe.prediction_type, recipe.spacing, recipe.size, guidance_scale=recipe.guidance_scale)
    pipe.save(out / "model")
    write_atomically(out / "model" / "recipe.json", lambda path: path.write_text(described))
    return Pipeline.load(out / "model"), clip, {**times, "training_s": sum(times.values())}, described


def _claim(path: Path, described: str, writes: bool) -> None:
    """Makes the folder for checkpoints, or makes sure that the unfinished run in it is the same as this one."""
    from minildm.checkpoint import write_atomically

    if path.exists() and path.read_text() != described:
        raise ValueError(
            f"{path.parent} holds an unfinished run of another recipe or dataset: repeat that command to finish it, "
            "give another --out, or delete the folder"
        )
    if writes:
        write_atomically(path, lambda beside: beside.write_text(described))
