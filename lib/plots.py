"""Every figure of the book, in one style. Functions take plain tensors and return a matplotlib Figure.

Colours are distinguishable with all common colour deficiencies (Okabe & Ito; ten classes: Paul Tol's `muted` plus grey),
and no figure says anything by colour alone.
"""
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLASSES = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
MARKERS = "osD^vP*X<>"
WIDTH = 7.2                                   # inches: the width of a page's text at 100 dpi


def use_style() -> None:
    """Set the book's matplotlib style; importing this module does it."""
    mpl.rcParams.update({
        "figure.figsize": (WIDTH, 3.0), "figure.dpi": 100, "figure.constrained_layout.use": True, "savefig.facecolor": "white",
        "figure.facecolor": "white", "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6,
        "axes.prop_cycle": mpl.cycler(color=PALETTE), "legend.frameon": False, "image.cmap": "gray", "axes.titlelocation": "left"})


use_style()


def curves(history: dict, panels: dict[str, dict[str, str]], title: str = "") -> Figure:
    """Training curves. panels: axis label -> {metric of the history: its name in the legend}; metrics not there are left out."""
    shown = {label: {m: n for m, n in lines.items() if m in history} for label, lines in panels.items()}
    shown = {label: lines for label, lines in shown.items() if lines}
    fig, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.7), squeeze=False)
    for ax, (label, lines) in zip(axes[0], shown.items()):
        for metric, name in lines.items():
            ax.plot(history["step"], history[metric], label=name)
        ax.set(xlabel="step", ylabel=label)
        if len(lines) > 1:
            ax.legend()
    if title:
        fig.suptitle(title, fontsize=10, x=0.01, ha="left")
    return fig


def image_grid(grid: Tensor, title: str = "", columns: int | None = None, xlabel: str = "", ylabel: str = "",
               width: float = WIDTH) -> Figure:
    """Images [rows, columns, C, S, S] in [0, 1] as one picture; a single column is wrapped to `columns` per row."""
    if columns:
        images = grid.flatten(0, 1)
        grid = images[:len(images) // columns * columns].unflatten(0, (-1, columns)) if len(images) >= columns else images[None]
    canvas = _canvas(grid)
    fig, ax = plt.subplots(figsize=(width, width * canvas.shape[0] / canvas.shape[1] + (0.3 if title else 0) + (0.3 if xlabel else 0)))
    ax.imshow(canvas, vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[:].set_visible(False)
    return fig


def _canvas(grid: Tensor, gap: int = 2) -> np.ndarray:
    """[rows, columns, C, S, S] -> one array [H, W] or [H, W, 3], white gaps between."""
    rows, columns, channels, side, _ = grid.shape
    canvas = np.ones((rows * (side + gap) - gap, columns * (side + gap) - gap, channels), np.float32)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (side + gap), j * (side + gap)
            canvas[top:top + side, left:left + side] = grid[i, j].cpu().permute(1, 2, 0).numpy()
    return canvas.squeeze(-1) if channels == 1 else canvas


def latent_map(z: Tensor, labels: Tensor, names: tuple[str, ...], title: str = "", limit: float = 5.0, point=None,
               ax=None) -> Figure:
    """Codes [n, 2] coloured by label [n], axes fixed to ±limit, each class named at its median; `point` marks one code."""
    fig = ax.figure if ax else None
    if ax is None:
        fig, ax = plt.subplots(figsize=(4.6, 4.6))
    z, labels = z.cpu().numpy(), labels.cpu().numpy()
    for i, name in enumerate(names):
        own = z[labels == i]
        if len(own):
            ax.scatter(*own.T, s=5, color=CLASSES[i % 10], marker=MARKERS[i % 10], alpha=0.5, linewidths=0, rasterized=True)
    for i, name in enumerate(names):
        if (labels == i).any():
            x, y = np.median(z[labels == i], axis=0).clip(-limit * 0.95, limit * 0.95)
            ax.text(x, y, name, ha="center", va="center", fontsize=9, fontweight="bold",
                    bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": CLASSES[i % 10], "alpha": 0.9})
    if point is not None:
        ax.plot(*point, marker="+", color="black", markersize=16, markeredgewidth=2.5)
    outside = (np.abs(z) > limit).any(1).mean()
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="$z_1$", ylabel="$z_2$",
           title=title + (f" ({outside:.0%} of the codes lie outside)" if outside >= 0.005 else ""))
    ax.set_aspect("equal")
    return fig


def decoder_map(grid: Tensor, extent: float, title: str = "") -> Figure:
    """Decoded images [n, n, C, S, S] laid out over z in ±extent."""
    canvas = _canvas(grid, gap=0)
    fig, ax = plt.subplots(figsize=(4.6, 4.6))
    ax.imshow(canvas, vmin=0, vmax=1, extent=(-extent, extent, -extent, extent), interpolation="antialiased")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=title)
    return fig
