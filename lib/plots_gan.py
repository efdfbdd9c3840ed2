"""Figures of the GAN as ground truth (lib/ganchain.py, lib/gandistance.py)."""
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots import MARKERS, PALETTE, WIDTH, canvas
from lib.plots_vamp import grids


def rows(images: dict[str, Tensor], title: str = "") -> Figure:
    """A named row of images for each kind or time: {name: [n, 3, S, S] in [0, 1]}, column by column the same image."""
    return grids({title: torch.cat(list(images.values()))}, rows=tuple(images))


def finding(metrics: dict, images: dict[str, Tensor], names: dict[str, str]) -> Figure:
    """ELBO up, images worse: both pairs' ELBO and distances, and below them rows of images.

    metrics: of celeba-fid, by name; images: {name: [n, 3, S, S] in [0, 1]}; names: what a pair is called in the figure.
    """
    scores = {"ELBO [1,000 nats per image]": ("elbo", 1e-3, "ceiling", "up is better"),
              "SWD × 1000 to the truth": ("swd", 1.0, "swd_floor", "down is better")}
    if f"fid_{next(iter(names))}" in metrics:
        scores["FID to the truth"] = ("fid", 1.0, "fid_floor", "down is better")
    grid = canvas(torch.stack([own.cpu() for own in images.values()]))
    height = WIDTH * grid.shape[0] / grid.shape[1]
    fig = plt.figure(figsize=(WIDTH, 2.7 + height))
    above, below = fig.subfigures(2, 1, height_ratios=(2.7, height))
    for ax, (label, (key, scale, known, better)) in zip(above.subplots(1, len(scores)), scores.items(), strict=True):
        found = [metrics[f"{key}_{name}"] for name in names]
        values, error = [scale * own["value"] for own in found], [2 * scale * (own["se"] or 0) for own in found]
        for i in range(len(names)):
            ax.errorbar(i, values[i], error[i], marker=MARKERS[i], color=PALETTE[i], markersize=8, capsize=4)
        ax.plot(range(len(names)), values, color="0.6", linewidth=1, zorder=0)
        if known in metrics:
            ax.axhline(scale * metrics[known]["value"], color="black", linestyle=":", linewidth=1)
            ax.annotate({"ceiling": "ceiling"}.get(known, "floor"), (1, scale * metrics[known]["value"]), (0, 3),
                        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9)
        ax.set(xticks=range(len(names)), xticklabels=names.values(), xlim=(-0.4, len(names) - 0.6), ylabel=label,
               title=better)
        ax.margins(y=0.15)
    ax = below.subplots()
    ax.imshow(grid, vmin=0, vmax=1, interpolation="nearest")
    side = next(iter(images.values())).shape[-1] + 2
    ax.set(xticks=[], yticks=[(i + 0.5) * side for i in range(len(images))], yticklabels=list(images))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig


def ways(metrics: dict, pairs: dict[str, str], hows: dict[str, str], key: str = "swd",
         unit: str = "SWD × 1000") -> Figure:
    """A distance of each pair measured in several ways (known fault 5): a row per way, a marker per pair.

    metrics: {key}_{pair}{how}; pairs and hows: what they are called.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 0.6 + 0.4 * len(hows)))
    for i, (pair, name) in enumerate(pairs.items()):
        found = [metrics.get(f"{key}_{pair}{how}") for how in hows]
        at = [k for k, own in enumerate(found) if own]
        error = [2 * (found[k]["se"] or 0) for k in at]
        ax.errorbar([found[k]["value"] for k in at], [k + 0.12 * (2 * i - 1) for k in at], xerr=error, fmt=MARKERS[i],
                    color=PALETTE[i], label=name, capsize=3)
    if f"{key}_floor" in metrics:
        ax.axvline(metrics[f"{key}_floor"]["value"], color="black", linestyle=":", linewidth=1, label="floor")
    ax.set(yticks=range(len(hows)), yticklabels=hows.values(), xlabel=f"{unit} (± 2 s.e.)", xlim=(0, None))
    ax.invert_yaxis()
    fig.legend(loc="outside right center")
    return fig
