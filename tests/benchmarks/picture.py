"""The picture of a results file: every ratio beside its goal, and what a step costs at each resolution."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"ours": "#1f6fb2", "reference": "#c46a2b"}


def draw(results: dict, file: Path) -> None:
    """Draws what there is of a results file, and writes a PNG."""
    rows = {name.replace("_", " "): report for name, report in results.items() if name not in ("samplers", "unet_step")}
    rows |= {f"U-Net, {name}": report for name, report in results.get("unet_step", {}).get("by case", {}).items()}
    rows |= {f"sampler {name}": report for name, report in results.get("samplers", {}).get("by sampler", {}).items()}
    rows = {name: report for name, report in rows.items() if report["ratio"] is not None}
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=(3, 2), layout="constrained")
    for row, report in enumerate(rows.values()):
        left.barh(row, report["ratio"], color=COLORS["ours"], label="ours / the reference at its best" if row == 0 else None)
        left.plot(report["ratio to the plain reference"], row, "o", color=COLORS["reference"], markersize=4,
                  label="ours / the reference as its users run it" if row == 0 else None)  # fmt: skip
        left.text(1.01, row, f"{report['ratio']:.2f}", va="center", fontsize=8, transform=left.get_yaxis_transform())
        if report["goal"]:
            left.plot([report["goal"]] * 2, [row - 0.45, row + 0.45], color="black", linewidth=2,
                      label="the goal: at most" if row == 0 else None)  # fmt: skip
    left.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(rows)), list(rows), fontsize=8)
    left.set_xlim(0, max([1.2, *(report["ratio"] * 1.02 for report in rows.values())]))
    left.invert_yaxis()
    left.set_xlabel("less is better")
    left.set_title("time or memory, ours / the reference", fontsize=10)
    if rows:
        left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    sides = results.get("resolution", {}).get("by side", {})
    for name in next(iter(sides.values()), {}):
        style = "-" if "channels last" in name else "--"
        seconds = [contestants[name]["median"] for contestants in sides.values()]
        right.loglog([*map(int, sides)], seconds, style, marker="o", color=COLORS[name.split(",")[0]], label=name, base=2)
    if sides:
        right.set_xticks([*map(int, sides)], list(sides))
        right.yaxis.set_major_formatter("{x:.3g}")
        right.set_xlabel("side of the latents")
        right.set_ylabel("seconds, forward and backward")
        right.legend(fontsize=7)
        right.set_title("cost against resolution", fontsize=10)
    fig.savefig(file, dpi=130)
    plt.close(fig)
