"""Figures of the 64x64 autoencoders and of disentanglement, in the style of plots.py."""
import math
import statistics

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.evaluate import paired
from lib.plots import MARKERS, PALETTE, WIDTH, logarithmic
from lib.runs import HOUSEKEEPING

LOOKS = {"samples": ("o", PALETTE[1]), "reconstructions": ("s", PALETTE[0])}


# ------------------------------------------------------------------------------------------------ recorded runs
def in_words(records: list[dict], of: tuple[str, ...]) -> list[str]:
    """A name for each record: its values of the parameters `of` and of all others that differ, but those not of it.

    The seed is left out.
    """
    others = dict.fromkeys(name for record in records for name in record["parameters"]
                           if name not in (*of, "seed", *HOUSEKEEPING))
    told = [name for name in others if len({str(record["parameters"].get(name)) for record in records}) > 1]
    return [", ".join([*(str(record["parameters"][name]) for name in of),
                       *(f"{name} {record['parameters'].get(name)}" for name in told)]) for record in records]


def learning_rates(records: list[dict], metric: str = "rec", ylabel: str = "squared error per pixel") -> Figure:
    """The metric's training curves in a panel for each learning rate, on one logarithmic scale: a line for each run."""
    shown = [record for record in records if metric in record.get("history", {})]
    rates = sorted({record["parameters"]["lr"] for record in shown}, reverse=True)
    fig, axes = plt.subplots(1, max(1, len(rates)), figsize=(WIDTH, 3.4), sharey=True, squeeze=False)
    names = [name.replace(f", lr {record['parameters']['lr']}", "")
             for name, record in zip(in_words(shown, ("model",)), shown, strict=True)]
    looks = {name: {"c": PALETTE[i % len(PALETTE)], "ls": ("-", "--", ":")[i // len(PALETTE) % 3]}
             for i, name in enumerate(dict.fromkeys(names))}
    for ax, rate in zip(axes[0], rates, strict=False):
        for name, record in zip(names, shown, strict=True):
            if record["parameters"]["lr"] == rate:
                ax.plot(record["history"]["step"], record["history"][metric], lw=1.2, **looks[name])
        ax.set(xlabel="step", title=f"learning rate {rate:g}")
    axes[0, 0].set(ylabel=ylabel)
    logarithmic(axes[0, 0])
    handles = [plt.Line2D([], [], label=name, **look) for name, look in looks.items()]
    if handles:
        fig.legend(handles=handles, loc="outside lower center", ncols=3 if max(map(len, names)) < 30 else 1)
    return fig


def appearance(records: list[dict]) -> Figure:
    """Sharpness and diversity of samples and reconstructions of each record, 1 being the test images', ±2 errors."""
    shown = [record for record in records if "sharpness_samples" in record["metrics"]]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 1.2 + 0.34 * len(shown)), sharey=True)
    for ax, measure in zip(axes, ("sharpness", "diversity"), strict=True):
        ax.axvline(1, c="0.5", lw=1)
        for kind, (marker, colour) in LOOKS.items():
            found = [record["metrics"][f"{measure}_{kind}"] for record in shown]
            value, error = [m["value"] for m in found], [2 * (m["se"] or 0) for m in found]
            ax.errorbar(value, range(len(shown)), xerr=error, fmt=marker, c=colour, ms=5, mfc="none", label=kind)
        ax.set(title=measure, xlabel="1: as the test images", xlim=(0, None))
    names = in_words(shown, ("model",))
    axes[0].set(yticks=range(len(shown)), yticklabels=names, ylim=(len(shown) - 0.5, -0.5))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


# ------------------------------------------------------------------------------------------------ disentanglement
def by_beta(panels: dict[str, dict[str, dict[float, dict[int, float]]]]) -> Figure:
    """A panel per metric, {its name: {setting: {beta: {seed: value}}}}: a dot a run, the mean and its 95 % interval.

    The interval is Student's over seeds; beta is on a logarithmic axis, the settings side by side.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.5 + 2.3 * rows), squeeze=False)
    betas = sorted({beta for settings in panels.values() for runs in settings.values() for beta in runs})
    settings = list(dict.fromkeys(setting for found in panels.values() for setting in found))
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for ax, (name, found) in zip(axes.flat, panels.items(), strict=False):
        for i, setting in enumerate(settings):
            shift, colour = 1.13 ** (i - (len(settings) - 1) / 2), PALETTE[i % len(PALETTE)]
            line = sorted(found.get(setting, {}).items())
            for beta, runs in line:
                values = list(runs.values())
                ax.plot([beta * shift] * len(values), values, "o", c=colour, mfc="none", ms=4, mew=0.9, alpha=0.8)
                if len(values) > 1:
                    own = paired(values, [0.0] * len(values), name)
                    ax.vlines(beta * shift, own["low"], own["high"], color=colour, lw=1.2)
            ax.plot([beta * shift for beta, _ in line], [statistics.fmean(runs.values()) for _, runs in line],
                    ("-", "--", ":")[i % 3], marker=MARKERS[i % len(MARKERS)], ms=5, c=colour, lw=1.2, label=setting)
        ax.set(xscale="log", xlabel="$\\beta$", title=name, ylim=(0, None))
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
    if settings:
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(settings)))
    return fig


def information(found: dict[str, Tensor], use: Tensor, title: str = "") -> Figure:
    """Nats that each dimension tells of each factor, {factor: [z_dim]}, as a table in grey.

    use [z_dim]: the KL of each dimension, in nats; the largest comes first.
    """
    order = use.argsort(descending=True).cpu()
    table = torch.stack(list(found.values())).cpu()[:, order].clamp_min(0).numpy()
    fig, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.32 * len(table)))
    ax.imshow(table, cmap="Greys", vmin=0, vmax=max(1.0, table.max().item()), aspect="auto")
    for i, row in enumerate(table.tolist()):
        for j, value in enumerate(row if len(row) <= 20 else ()):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if value > 0.55 * max(1.0, table.max().item()) else "black")
    names = [f"$z_{{{j + 1}}}$\n{use[j]:.2g}" for j in order.tolist()]
    ax.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(found)), yticklabels=list(found), title=title,
           xlabel="dimension, and its KL [nats]")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig
