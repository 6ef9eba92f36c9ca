"""`make bench`: ours and the reference library side by side on this machine, in turns, as medians and ratios.

    python tests/benchmarks/run.py                       # all of it: about twenty minutes on two cores
    python tests/benchmarks/run.py --only sd15 decode    # some; the rest of the file stays as it is
    python tests/benchmarks/run.py --quick               # whether all of it runs: small inputs, few rounds, another file

Measurements, not tests: nothing here passes or fails.  Writes results-cpu.json or results-cuda.json and a picture of it beside
this file; how to read them stands in README.md there.  Where diffusers is missing, ours is measured alone.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import memory
import networks
import overhead
import torch
from picture import draw
from timing import DEVICE, HAS_REFERENCE

from minildm.checkpoint import write_atomically
from minildm.machine import machine

HERE = Path(__file__).parent
MEASURES = {
    measure.__name__: measure
    for measure in (
        overhead.imports, overhead.samplers, networks.unet_step, networks.training, networks.sampling, networks.resolution,
        networks.sd15, networks.decode, memory.memory_training, memory.memory_decode,
    )
}  # fmt: skip


def where() -> dict:
    """The machine, and the versions that count."""
    about = {name: value for name, value in machine().items() if name != "peak_memory"}
    about["diffusers"] = version("diffusers") if HAS_REFERENCE else "not installed"
    if DEVICE == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return about | {"threads": torch.get_num_threads()}


def line(name: str, report: dict) -> str:
    """One measure in one line."""
    ours, *reference = (f"{report['contestants'][best]['median']:.4g}" for best in report["best"])
    if not reference:
        return f"{name:16} {ours} {report['unit']}; no reference"
    goal = f", goal {report['goal']:.2f}" if report["goal"] else ""
    return f"{name:16} {ours} against {reference[0]} {report['unit']}: {report['ratio']:.2f}{goal}"


def main() -> None:
    """Measures, and writes after each measure, so that nothing is lost."""
    parser = argparse.ArgumentParser(description="Ours and the reference library side by side.")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="the file to write")
    args = parser.parse_args()
    out = args.out or (Path("out/bench-quick.json") if args.quick else HERE / f"results-{DEVICE}.json")
    print(f"on {DEVICE}, {torch.get_num_threads()} threads; writes {out}", flush=True)
    if not HAS_REFERENCE:
        print("diffusers is not installed: ours is measured alone; pip install diffusers for the ratios", flush=True)
    for name in args.only:
        print(f"{name:16} {MEASURES[name].__doc__}", flush=True)
        start = time.perf_counter()
        report = MEASURES[name](args.quick) | {"where": where(), "quick": args.quick}
        print(line(name, report) + f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        results = json.loads(out.read_text()) if out.exists() else {}
        results = {n: (results | {name: report}).get(n) for n in MEASURES if n in {*results, name}}
        write_atomically(out, lambda path, results=results: path.write_text(json.dumps(results, indent=1) + "\n"))
    draw(json.loads(out.read_text()), out.with_suffix(".png"))


if __name__ == "__main__":
    main()
