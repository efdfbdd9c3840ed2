"""Every figure of the book, in one style. Functions take plain tensors and return a matplotlib Figure.

Colours are distinguishable with all common colour deficiencies (Okabe & Ito; ten classes: Paul Tol's `muted` plus
grey), and no figure says anything by colour alone.
"""
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLASSES = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
MARKERS = "osD^vP*X<>"
WIDTH = 7.2                                   # inches: the width of a page's text at 100 dpi


def use_style() -> None:
    """Set the book's matplotlib style; importing this module does it."""
    mpl.rcParams.update({
        "figure.figsize": (WIDTH, 3.0), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 10, "axes.titlesize": 10,
        "axes.labelsize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "lines.linewidth": 1.6,
        "legend.frameon": False, "image.cmap": "gray", "axes.prop_cycle": mpl.cycler(color=PALETTE)})


use_style()


def curves(history: dict, panels: dict[str, dict[str, str]], title: str = "", x: str = "step",
           log: bool = False) -> Figure:
    """Training curves. panels: axis label -> {metric: its name in the legend}; absent metrics are left out.

    x: what the history counts, `step` or, on a logarithmic axis and without the first of many, `epoch`. log: values on
    logarithmic axes.
    """
    if x == "epoch":
        history = {name: values[len(values) // 100:] for name, values in history.items()}
    shown = {label: {m: n for m, n in lines.items() if m in history} for label, lines in panels.items()}
    shown = {label: lines for label, lines in shown.items() if lines} or {"nothing was trained": {}}
    fig, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.7), squeeze=False)
    for ax, (label, lines) in zip(axes[0], shown.items(), strict=True):
        for metric, name in lines.items():
            ax.plot(history[x], history[metric], label=name)
        ax.set(xlabel=x, ylabel=label)
        if x == "epoch":
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        if log:
            logarithmic(ax)
        if len(lines) > 1:
            ax.legend()
    if title:
        fig.suptitle(title, fontsize=10, x=0.01, ha="left")
    return fig


def logarithmic(ax) -> None:
    """Make the y-axis logarithmic, its ticks plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def compare(found: list[dict], metric: str, ylabel: str, by: list[str], log: bool = False) -> Figure:
    """One curve per run record that has the metric in its history, named at the right by those of `by` that differ.

    Of a run folder its last part is the name. log: steps on a logarithmic axis, for runs of very different length.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 3.0))
    shown = [record for record in found if metric in record.get("history", {})]
    by = [name for name in by if len({str(record["parameters"][name]) for record in shown}) > 1] or by[:1]
    for i, record in enumerate(sorted(shown, key=lambda record: -record["history"][metric][-1])):
        label = ", ".join(str(record["parameters"][name]).rpartition("/")[2] for name in by)
        ax.plot(record["history"]["step"], record["history"][metric], color=PALETTE[i % len(PALETTE)],
                linestyle=("-", "--")[i // len(PALETTE) % 2], linewidth=1.2, label=label)
    late = [value for record in shown for value in record["history"][metric][len(record["history"]["step"]) // 20:]]
    ax.set(xlabel="step", ylabel=ylabel)
    if log and shown:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    if late:                                              # the first steps would hide the rest
        margin = 0.05 * (max(late) - min(late))
        ax.set_ylim(min(late) - margin, max(late) + margin)
        fig.legend(loc="outside right center", title=", ".join(by))
    return fig


def image_grid(grid: Tensor, title: str = "", columns: int | None = None, xlabel: str = "", ylabel: str = "",
               width: float = WIDTH) -> Figure:
    """Images [rows, columns, C, S, S] in [0, 1] as one picture; a single column is wrapped to `columns` per row."""
    if columns:
        images = grid.flatten(0, 1)
        columns = min(columns, len(images))
        grid = images[:len(images) // columns * columns].unflatten(0, (-1, columns))
    picture = canvas(grid)
    height = width * picture.shape[0] / picture.shape[1] + 0.3 * bool(title) + 0.3 * bool(xlabel)
    fig, ax = plt.subplots(figsize=(width, height))
    ax.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[:].set_visible(False)
    return fig


def canvas(grid: Tensor, gap: int = 2) -> np.ndarray:
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
    """Codes [n, 2] coloured by label [n], axes fixed to ±limit, each class named at its median; point marks a code."""
    fig = ax.figure if ax else None
    if ax is None:
        fig, ax = plt.subplots(figsize=(4.6, 4.6))
    z, labels = z.cpu().numpy(), labels.cpu().numpy()
    for i in range(len(names)):
        ax.scatter(*z[labels == i].T, s=5 if len(z) > 2000 else 14, color=CLASSES[i % 10], marker=MARKERS[i % 10],
                   alpha=0.5, linewidths=0, rasterized=True)
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
    picture = canvas(grid, gap=0)
    fig, ax = plt.subplots(figsize=(4.6, 4.6))
    ax.imshow(picture, vmin=0, vmax=1, extent=(-extent, extent, -extent, extent), interpolation="antialiased")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=title)
    return fig


# ---------------------------------------------------------------------------- symmetric learning (lib/symmetric.py)
def bit_information(layers: dict[str, Tensor], title: str = "") -> Figure:
    """Mutual information of each bit, largest first: a line per layer, {its name: [n] in bits}."""
    fig, ax = plt.subplots(figsize=(WIDTH, 2.7))
    for i, (name, mi) in enumerate(layers.items()):
        values = mi.detach().cpu().sort(descending=True).values.clamp_min(0)
        ax.plot(range(1, len(values) + 1), values, color=PALETTE[i], marker=MARKERS[i], markersize=3, linewidth=1,
                label=f"{name}: {values.sum():.1f} bits in all")
    ax.set(xlabel="bit, the most informative first", ylabel="mutual information [bits]", ylim=(0, None), title=title)
    ax.legend()
    return fig


def by_sweeps(curves: dict[str, dict[int, dict]], ylabel: str, title: str = "", dashed: str = "") -> Figure:
    """A metric {"value", "se"} against the number of sweeps, a line with ±2 standard errors per name in curves.

    Names that contain `dashed` are dashed; the vertical axis is logarithmic if the values spread over a factor of ten.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 3.0))
    for i, (name, found) in enumerate(curves.items()):
        sweeps = sorted(found)
        value = np.array([found[k]["value"] for k in sweeps])
        error = 2 * np.array([found[k]["se"] or 0.0 for k in sweeps])
        style = "--" if dashed and dashed in name else "-"
        ax.plot(sweeps, value, style, color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)],
                markersize=4, label=name)
        ax.fill_between(sweeps, value - error, value + error, color=PALETTE[i % len(PALETTE)], alpha=0.2, linewidth=0)
    values = [metric["value"] for found in curves.values() for metric in found.values()] or [1.0]
    if min(values) > 0 and max(values) / min(values) > 10:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    ticks = sorted({k for found in curves.values() for k in found})
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="encode-decode sweeps (and one more)", ylabel=ylabel, title=title, xlim=(-0.1, None), xticks=ticks,
           xticklabels=[str(k) for k in ticks])
    ax.minorticks_off()
    if len(curves) > 1:
        fig.legend(loc="outside right center")
    return fig


# ---------------------------------------------------------------------------- Gaussian mixture (lib/gmm.py)
def gmm_maps(x: Tensor, states: Tensor, axis: Tensor, regions: Tensor, centres: dict[str, Tensor],
             names: tuple[str, ...], points: int = 1000) -> Figure:
    """A panel per title in `centres`: some points x [n, 2] by state [panels, n] over the regions of the states.

    regions [panels, g * g] lie on the square of axis [g], x_1 slowest. Lines: the borders of the first panel;
    markers: the centres [4, 2] of each panel, with a line to the first panel's. `names`: of the four states.
    """
    titles, centres = list(centres), [own.detach().cpu().numpy() for own in centres.values()]
    x, states, axis = x.cpu().numpy(), states.cpu().numpy(), axis.cpu().numpy()
    regions = regions.cpu().unflatten(1, (len(axis), len(axis))).mT.numpy()
    shown = np.random.default_rng(0).permutation(len(x))[:points]
    fig, axes = plt.subplots(1, len(titles), figsize=(WIDTH, 0.46 * WIDTH), sharex=True, sharey=True)
    shades = mpl.colors.ListedColormap(PALETTE[:4])
    for i, ax in enumerate(axes):
        ax.pcolormesh(axis, axis, regions[i], cmap=shades, vmin=0, vmax=3, alpha=0.22, rasterized=True)
        for k in range(4):
            ax.contour(axis, axis, regions[0] == k, [0.5], colors="black", linewidths=0.8)
            own = x[shown][states[i][shown] == k]
            ax.scatter(*own.T, s=6, color=PALETTE[k], marker=MARKERS[k], alpha=0.4, linewidths=0)
        _moved(ax, centres[0], centres[i])
        ax.set(title=titles[i], xlabel="$x_1$", aspect="equal")
    axes[0].set(ylabel="$x_2$", xlim=(axis[0], axis[-1]), ylim=(axis[0], axis[-1]))
    handles = [plt.Line2D([], [], ls="", marker=MARKERS[k], c=PALETTE[k], label=f"z = {name}")
               for k, name in enumerate(names)]
    handles += [plt.Line2D([], [], c="black", lw=0.8, label="borders of the first panel")]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.2, handletextpad=0.4)
    return fig


def _moved(ax, start: np.ndarray, centres: np.ndarray) -> None:
    """The centres [4, 2] by state, each with a line to the dot where it started."""
    for k in range(4):
        ax.plot(*np.stack([start[k], centres[k]]).T, "-o", c="black", ms=3, lw=1.4, zorder=4)
        ax.plot(*centres[k], MARKERS[k], ms=7, c=PALETTE[k], mec="black", mew=1, zorder=5)


def gmm_drift(start: Tensor, centres: Tensor, names: tuple[str, ...]) -> Figure:
    """How far each centre [4, 2] moved, and the quadrilateral of states 0, 1, 3, 2 before and after.

    In a parallelogram the bits' interaction in the posterior no longer depends on x; in a rectangle there is none.
    """
    start, centres = start.cpu().numpy(), centres.detach().cpu().numpy()
    fig, ax = plt.subplots(figsize=(0.8 * WIDTH, 0.55 * WIDTH))
    for corners, style in ((start, {"ls": "--", "c": "0.5", "label": "ground truth"}),
                           (centres, {"ls": "-", "c": "0.2", "label": "after joint training"})):
        ax.plot(*corners[[0, 1, 3, 2, 0]].T, lw=1.2, **style)
    _moved(ax, start, centres)
    for k, (x, y) in enumerate(centres.tolist()):
        ax.annotate("", (x, y), start[k], arrowprops={"arrowstyle": "-|>", "fc": "black", "shrinkB": 3})
        side = 1 if x > centres[:, 0].mean() else -1
        ax.annotate(f"z = {names[k]}\nmoved {np.linalg.norm(centres[k] - start[k]):.2f}", (x, y), (14 * side, 0),
                    textcoords="offset points", va="center", ha="left" if side > 0 else "right")
    ax.set(title="Drift of the centres", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.margins(0.45, 0.12)
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def gmm_curves(history: dict, switch: int, published: tuple[float, ...] = ()) -> Figure:
    """ELBO and log evidence over both stages, nats per point; the band between them is KL(q || posterior).

    history: step, elbo, evidence; switch: the last step of stage 1; published: the ELBO after each stage.
    """
    step, elbo, evidence = (np.array(history[name]) for name in ("step", "elbo", "evidence"))
    shown = [*elbo[step > 0.3 * switch], *evidence, *published]
    margin = 0.2 * (max(shown) - min(shown))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.42 * WIDTH))
    ax.fill_between(step, elbo, evidence, color=PALETTE[0], alpha=0.15, lw=0)
    ax.axvline(switch, c="0.4", lw=1, ls=":")
    middles = 0.5 * switch, 0.5 * (switch + step[-1])
    for line, colour, name, at, (right, up) in ((evidence, PALETTE[1], "log evidence", middles[0], (0, 10)),
                                                (elbo, PALETTE[0], "ELBO", middles[1], (16, -8))):
        ax.plot(step, line, c=colour)
        ax.annotate(name, (at, np.interp(at, step, line)), (right, up), c=colour, textcoords="offset points",
                    ha="center", va="center")
    for at, name in zip(middles, ("stage 1: encoder", "stage 2: encoder and centres"), strict=True):
        ax.text(at, 1.01, name, transform=ax.get_xaxis_transform(), va="bottom", ha="center")
    if published:
        values = ", ".join(f"{value:.2f}".replace("-", "−") for value in published)
        ax.plot((switch, step[-1]), published, "*", ms=11, c="black", zorder=5, clip_on=False,
                label=f"published ELBO: {values}")
        ax.legend(loc="lower right")
    ax.set(xlabel="step", ylabel="nats per point", xlim=(0, step[-1]),
           ylim=(min(shown) - margin, max(shown) + margin))
    return fig
