"""Figures of the VampPrior chapters, in the style of plots.py: latents, images, training, likelihoods, units.

A metric is a {"value", "se", "n", "unit"} of lib/evaluate.py. Every function raises ValueError where a number that it
is to draw is not finite.
"""
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.evaluate import paired
from lib.plots import MARKERS, PALETTE, WIDTH, canvas, latent_map

NORMAL_95 = math.sqrt(-2 * math.log(0.05))         # radius of the disc that holds 95 % of N(0, I) in the plane: 2.45
HISTORY = {"loss": "negative ELBO", "rec": "reconstruction, $-\\log p(x|z)$", "kl": "KL$(q\\,\\|\\,p)$, all layers"}


def _finite(what: str, values) -> None:
    values = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
    if not values.isfinite().all():
        raise ValueError(f"{what} must be finite to be drawn: look for the run or the image that gave NaN or inf")


# ------------------------------------------------------------------------------------------------ latents
def latents(panels: dict[str, Tensor], labels: Tensor, names: tuple[str, ...],
            axes: tuple[str, str] = ("$z_1$", "$z_2$"), components: Tensor | None = None, normal: bool = False,
            limit: float | None = None) -> Figure:
    """Codes by class in one panel per title, all on one scale: {title: [n, 2]}, labels [n], the classes' names.

    limit: half the side of the square around the origin that is shown; None: what holds 99.5 % of the codes of every
    panel. components: means [K, 2] of the prior's components, or [K, 1] of a prior of the first axis only. normal: the
    circle that holds 95 % of N(0, I), where samples of known fault 10 come from. Raises ValueError: codes not [n, 2]
    with a label each.
    """
    for title, z in panels.items():
        if z.ndim != 2 or z.shape[1] != 2 or len(z) != len(labels) or not len(z):
            raise ValueError(f"{title}: codes to draw must be [n, 2] with a label each, got {list(z.shape)} and "
                             f"{len(labels)} labels")
        _finite(f"{title}: codes", z)
    if limit is None:
        reach = [z.detach().float().abs().amax(1).quantile(0.995).item() for z in panels.values()]
        limit = 1.05 * max(*reach, NORMAL_95 if normal else 0.0) or 1.0
    width = WIDTH if len(panels) > 1 else 0.6 * WIDTH
    height = width / len(panels) + (0.7 if normal or components is not None else 0.35)
    fig, drawn = plt.subplots(1, len(panels), figsize=(width, height), sharex=True, sharey=True, squeeze=False)
    for ax, (title, z) in zip(drawn[0], panels.items(), strict=True):
        latent_map(z.detach(), labels, names, title, limit, ax=ax)
        ax.set(xlabel=axes[0], ylabel=axes[1])
        ax.label_outer()
        for name in ax.texts if max(map(len, names)) > 3 else ():
            name.set_fontsize(7)
        _prior(ax, components, normal, limit)
    if handles := drawn[0, 0].get_legend_handles_labels()[0]:
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def _prior(ax, components: Tensor | None, normal: bool, limit: float) -> None:
    """The means of the prior's components, and the circle of N(0, I) with an arrow to it where it is small."""
    if components is not None:
        _finite("the components' means", components)
        means = components.detach().cpu().float()
        told = f"means of the prior's components, $K$ = {len(means)}"
        if means.shape[1] == 1:
            ax.plot(means[:, 0], torch.full((len(means),), 0.015), "|", c="black", ms=9, mew=0.8, alpha=0.5,
                    transform=ax.get_xaxis_transform(), label=told)
        else:
            ax.scatter(*means.T, s=8, facecolors="white", edgecolors="black", linewidths=0.7, zorder=2.6, label=told)
    if normal:
        turn = np.linspace(0, 2 * np.pi, 100)
        ax.plot(NORMAL_95 * np.cos(turn), NORMAL_95 * np.sin(turn), c="black", lw=1.4, zorder=2.7,
                label="95 % of $N(0, I)$")
        if NORMAL_95 < 0.05 * limit:
            ax.annotate("$N(0, I)$", (0, 0), (0.85 * limit, -0.92 * limit), ha="center", va="center", zorder=4,
                        bbox={"fc": "white", "ec": "none", "pad": 1.5, "alpha": 0.9},
                        arrowprops={"arrowstyle": "-|>", "fc": "black", "shrinkB": 2})


# ------------------------------------------------------------------------------------------------ images
def of_each_class(labels: Tensor, classes: int, n: int = 10) -> Tensor:
    """Indices [classes, m] of the first m images of each class, by labels [N]: m is n, or less if a class has fewer.

    Raises ValueError where a class has none.
    """
    found = [(labels == k).nonzero().flatten() for k in range(classes)]
    m = min(n, *(len(own) for own in found))
    if not m:
        empty = next(k for k, own in enumerate(found) if not len(own))
        raise ValueError(f"there is no image of class {empty} to show: take more images")
    return torch.stack([own[:m] for own in found])


def grids(panels: dict[str, Tensor], columns: int | None = None, rows: tuple[str, ...] = ()) -> Figure:
    """Images [n, C, S, S] in [0, 1] in a grid per title, side by side: {"from the prior": ..., "from N(0, I)": ...}.

    columns: of each grid, 20 for all of them together by default; the last row need not be full. rows: names of the
    rows, which then share the images equally: classes of originals and reconstructions (see `of_each_class`). Raises
    ValueError: other images, grids of unlike size, rows that do not share the images.
    """
    n = _checked(panels)
    if rows and n % len(rows):
        raise ValueError(f"{len(rows)} rows cannot share {n} images equally")
    columns = n // len(rows) if rows else min(n, columns or max(1, 20 // len(panels)))
    names = 0.09 * max(map(len, rows), default=0)                       # inches that the rows' names take
    side = min(0.75, (WIDTH - names) / len(panels) / columns - 0.02)
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, side * math.ceil(n / columns) + 0.4), squeeze=False)
    for ax, (title, images) in zip(axes[0], panels.items(), strict=True):
        images = torch.cat([images.detach().cpu(), images.new_ones(-n % columns, *images.shape[1:]).cpu()])
        ax.imshow(canvas(images.unflatten(0, (-1, columns))), vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=title, anchor="NW")
        ax.spines[:].set_visible(False)
    pitch = images.shape[-1] + 2                                        # canvas leaves a gap of two pixels
    axes[0, 0].set_yticks([i * pitch + pitch / 2 - 1.5 for i in range(len(rows))], rows)
    axes[0, 0].tick_params(length=0)
    return fig


def _checked(panels: dict[str, Tensor]) -> int:
    """How many images each panel has. ValueError: none, unlike shapes, not [n, C, S, S] in [0, 1]."""
    shapes = {tuple(images.shape) for images in panels.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or not shape[0]:
        raise ValueError("the grids need images [n, C, S, S] of one shape, got "
                         f"{[list(images.shape) for images in panels.values()]}")
    for title, images in panels.items():
        _finite(f"{title}: pixels", images)
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            raise ValueError(f"{title}: pixels must be floats in [0, 1]: divide uint8 images by 255")
    return shape[0]


# ------------------------------------------------------------------------------------------------ training
def loss_history(history: dict[str, list[float]], title: str = "", best: float | None = None) -> Figure:
    """Negative ELBO, reconstruction and KL in nats per image: training solid, validation dashed, three panels.

    history: epoch (or step) and some of loss, rec, kl, val_loss, val_rec, val_kl; a panel without any is left out.
    Give `vampprior.by_epoch` of a history with a warm-up: its own loss is of the weighted KL.
    best: the epoch that was kept, a dotted line. Of 20 epochs or more the first tenth does not count for the vertical
    axes, which it may leave. Raises ValueError: a history without any of these.
    """
    shown = [metric for metric in HISTORY if history.get(metric) or history.get(f"val_{metric}")]
    if not shown:
        raise ValueError(f"there is no {', '.join(HISTORY)} in the history to draw: train first")
    x = "epoch" if "epoch" in history else "step"
    fig, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.9), squeeze=False)
    for ax, metric in zip(axes[0], shown, strict=True):
        late = []
        for i, (key, label) in enumerate(((metric, "training"), (f"val_{metric}", "validation"))):
            if values := history.get(key, []):
                _finite(key, values)
                ax.plot(history[x], values, ("-", "--")[i], c=PALETTE[i], label=label,
                        marker=MARKERS[i] if len(values) == 1 else "")
                late += values[len(values) // 10 if len(values) >= 20 else 0:]
        margin = 0.06 * (max(late) - min(late)) or 1.0
        if best is not None:
            ax.axvline(best, c="0.3", lw=1, ls=":", label=f"kept: {x} {best:g}")
        ax.set_title(HISTORY[metric], fontsize=9)
        ax.set(xlabel=x, ylim=(min(late) - margin, max(late) + margin))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(ylabel="nats per image")
    if title:
        fig.suptitle(title, fontsize=10, x=0.01, ha="left")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# ------------------------------------------------------------------------------------------------ likelihoods
def by_components(points: list[tuple[int, float, float | None, str]], title: str = "",
                  ylabel: str = "log-likelihood [nats per image]") -> Figure:
    """A value against the number of the prior's components: (K, value, its standard error or None, model) a point.

    A line with ±2 standard errors for each model, K logarithmic. Raises ValueError: K < 1.
    """
    _finite("K and what was found there", [number for k, value, se, _ in points for number in (k, value, se or 0)])
    if min((k for k, *_ in points), default=1) < 1:
        raise ValueError("a prior has at least one component: K must be at least 1")
    fig, ax = plt.subplots(figsize=(WIDTH, 3.0))
    for i, model in enumerate(dict.fromkeys(label for *_, label in points)):
        own = sorted((k, value, 2 * (se or 0.0)) for k, value, se, label in points if label == model)
        k, value, error = zip(*own, strict=True)
        ax.errorbar(k, value, error, color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], ms=5,
                    ls=("-", "--")[i % 2], capsize=3, elinewidth=1, label=model)
    ticks = sorted({k for k, *_ in points})
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set(xlabel="components of the prior, $K$", ylabel=ylabel, title=title)
    if points:
        ax.set_xlim(min(ticks) / 1.4, max(ticks) * 1.4)
        fig.legend(loc="outside right center")
    return fig


def _rows(ax, names: list[str]) -> None:
    """Names of the rows 0, 1, ..., from above, and lines between them."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.45, -0.55))
    ax.tick_params(axis="y", length=0)
    for i in range(len(names) - 1):
        ax.axhline(i + 0.5, color="0.85", lw=0.8)


def improvement(pairs: dict[str, tuple[Sequence[float], Sequence[float]]], published: dict[str, float] | None = None,
                title: str = "", xlabel: str = "gained by the VampPrior [nats per image]") -> Figure:
    """Differences a - b of runs paired by seed, {setting: (a, b)}: a dot a pair, their mean with Student's interval.

    The interval is of 95 %, see `evaluate.paired`; one pair has none. published: the difference of each setting, a
    star. The grey line is at no difference. Raises ValueError: lists of unequal length, or empty.
    """
    published = published or {}
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.5 * len(pairs)))
    ax.axvline(0, c="0.5", lw=1)
    for i, (setting, (a, b)) in enumerate(pairs.items()):
        if not len(a) or len(a) != len(b):
            raise ValueError(f"{setting}: pairs need as many numbers of each kind, got {len(a)} and {len(b)}")
        apart = [x - y for x, y in zip(a, b, strict=True)]
        _finite(f"{setting}: differences", apart)
        ax.plot(apart, [i - 0.24] * len(apart), "o", mfc="none", c=PALETTE[0], ms=6, mew=1.2)
        if len(apart) > 1:
            found = paired(a, b, "nats per image")
            ax.hlines(i, found["low"], found["high"], color=PALETTE[1], lw=2)
            ax.plot(found["value"], i, "D", c=PALETTE[1], ms=6)
        if setting in published:
            _finite(f"{setting}: published", [published[setting]])
            ax.plot(published[setting], i + 0.25, "*", c="black", mfc="white", ms=11)
        ax.text(1.01, i, f"$n$ = {len(apart)}", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    _rows(ax, list(pairs))
    ax.set(xlabel=xlabel, title=title)
    handles = [plt.Line2D([], [], ls="", marker="o", mfc="none", c=PALETTE[0], label="one seed"),
               plt.Line2D([], [], marker="D", c=PALETTE[1], label="mean, 95 % interval over $n$ seeds")]
    if published:
        handles.append(plt.Line2D([], [], ls="", marker="*", mfc="white", c="black", ms=11, label="published"))
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


# ------------------------------------------------------------------------------------------------ units
def units(activity: dict[str, Tensor], kl: dict[str, dict[str, float]] | None = None,
          threshold: float = 0.01) -> Figure:
    """Variance over the images of each unit's posterior mean, Var_x E[z_d|x] [d], largest first: a line per model.

    Active above the threshold (Burda et al. 2015, section 5). kl: {model: {layer: nats per image}}, stacked bars in a
    panel of their own. Variances below a thousandth of the threshold are drawn there.
    """
    fig, axes = plt.subplots(1, 2 if kl else 1, figsize=(WIDTH, 3.3), squeeze=False, width_ratios=[2, 3] if kl else [1])
    if kl:
        _layers(axes[0, 0], kl)
    ax = axes[0, -1]
    ax.axhline(threshold, c="0.4", lw=1, ls=":")
    for i, (model, values) in enumerate(activity.items()):
        _finite(f"{model}: activities", values)
        values = values.detach().cpu().double().sort(descending=True).values
        told = f"{model}: {(values > threshold).sum()} of {len(values)} active"
        ax.plot(range(1, len(values) + 1), values.clamp_min(threshold / 1000), c=PALETTE[i % len(PALETTE)], lw=1, ms=4,
                marker=MARKERS[i % len(MARKERS)], label=told)
    ax.text(1, threshold, f"{threshold:g}", transform=ax.get_yaxis_transform(), va="bottom", ha="right", fontsize=8)
    ax.set(yscale="log", xlabel="unit, the most active first", title="$\\mathrm{Var}_x\\,\\mathrm{E}[z_d | x]$")
    ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def _layers(ax, kl: dict[str, dict[str, float]]) -> None:
    """A stacked bar a model, a hatched part a layer; the layers' numbers behind it."""
    layers = dict.fromkeys(layer for own in kl.values() for layer in own)
    looks = {layer: {"fc": ("white", "0.85", "0.7")[j % 3], "hatch": ("", "///", "...")[j % 3], "ec": "black"}
             for j, layer in enumerate(layers)}
    for i, (model, own) in enumerate(kl.items()):
        _finite(f"{model}: KL of the layers", own.values())
        left = 0.0
        for layer, value in own.items():
            ax.barh(i, value, left=left, height=0.6, lw=0.8, **looks[layer])
            left += value
        ax.text(left, i, "  " + " + ".join(f"{value:.1f}" for value in own.values()), va="center", fontsize=8)
    ax.margins(x=0.45)
    _rows(ax, list(kl))
    ax.set(xlabel="nats per image", title="KL of each layer")
    ax.legend(handles=[plt.Rectangle((0, 0), 1, 1, label=layer, **look) for layer, look in looks.items()],
              loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
