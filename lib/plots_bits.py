"""Figures of codes of bits, in the style of plots.py: search by them, what they are like, gradients through them."""
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots import MARKERS, PALETTE, WIDTH


def retrieval(at_k: dict[str, dict[int, dict]], balls: dict[str, list[dict]], chance: float) -> Figure:
    """Precision of the k nearest against k, and within a Hamming radius against it, a line with ±2 se per name.

    at_k: name -> {k: metric}; balls: name -> `search.within` of its codes, drawn to half the bits; dotted: the share of
    queries that find anything there. A name has one colour in both panels; chance is a grey line.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    looks = {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
             for i, name in enumerate(dict.fromkeys([*at_k, *balls]))}
    for name, found in at_k.items():
        _band(left, sorted(found), [found[k] for k in sorted(found)], *looks[name], name)
    for name, found in balls.items():
        shown = found[:len(found) // 2 + 1]
        _band(right, range(len(shown)), [ball["precision"] for ball in shown], *looks[name], name)
        right.plot([ball["answered"]["value"] for ball in shown], ":", color=looks[name][0], lw=1.2)
    for ax in (left, right):
        ax.axhline(chance, color="0.5", lw=1)
    left.set(xscale="log", xlabel="k", ylabel="precision", ylim=(0, None), title="of the k nearest")
    left.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="Hamming radius [bits]", ylim=(0, 1.02), title="of all within (dotted: share answered)")
    handles = [plt.Line2D([], [], color=colour, marker=marker, ms=4, label=name)
               for name, (colour, marker) in looks.items()]
    handles += [plt.Line2D([], [], color="0.5", lw=1, label=f"chance, {chance:.3f}")]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def _band(ax, x, metrics: list[dict], colour: str, marker: str, name: str) -> None:
    """Metrics {"value", "se"} against x, with a band of ±2 standard errors."""
    value = np.array([metric["value"] for metric in metrics])
    error = 2 * np.array([metric["se"] or 0.0 for metric in metrics])
    ax.plot(x, value, color=colour, marker=marker, markersize=4, label=name)
    ax.fill_between(x, value - error, value + error, color=colour, alpha=0.2, linewidth=0)


def by_group(found: dict[str, dict[str, dict]], xlabel: str, title: str = "") -> Figure:
    """A metric {"value", "se"} by group, a marker with ±2 se per name.

    The groups are in the order of the first name's values, "all" (if there) is above them.
    """
    first = next(iter(found.values()))
    groups = sorted(first, key=lambda group: (group == "all", first[group]["value"]))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.8 + 0.2 * len(groups)))
    for i, (name, metrics) in enumerate(found.items()):
        own = [(metrics[group], y) for y, group in enumerate(groups) if group in metrics]
        ax.errorbar([metric["value"] for metric, _ in own], [y for _, y in own],
                    xerr=[2 * (metric["se"] or 0.0) for metric, _ in own], fmt=MARKERS[i % len(MARKERS)],
                    color=PALETTE[i % len(PALETTE)], markersize=5, elinewidth=1, label=name)
    ax.set(yticks=range(len(groups)), yticklabels=groups, xlabel=xlabel, xlim=(0, None), title=title)
    ax.grid(axis="y", color="0.9", lw=0.8)
    fig.legend(loc="outside lower center", ncols=4)
    return fig


def code_bits(ones: dict[str, Tensor], entropy: dict[str, Tensor]) -> Figure:
    """The share of ones and the entropy [bits] of each bit [b] of some codes by name, both in ascending order.

    The horizontal axis is the share of the code's bits, so that codes of other lengths compare; ideal is the grey line.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    for ax, values, ideal in zip(axes, (ones, entropy), (0.5, 1.0), strict=True):
        ax.axhline(ideal, color="0.5", lw=1)
        for i, (name, own) in enumerate(values.items()):
            own = own.sort().values.cpu().numpy()
            ax.plot((np.arange(len(own)) + 0.5) / len(own), own, color=PALETTE[i % len(PALETTE)], ms=4, lw=1,
                    marker=MARKERS[i % len(MARKERS)], label=name)
        ax.set(xlim=(0, 1), xlabel="bits of the code, sorted [share]", ylim=(-0.03, 1.05))
    axes[0].set(ylabel="share of ones", title="balance")
    axes[1].set(ylabel="entropy [bits]", title="entropy of a bit")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def bias_and_variance(found: dict[int, dict], names: tuple[str, ...], title: str = "") -> Figure:
    """Bias and variance of the estimators `names` over epochs, found: {epoch: `estimators.measure`}.

    Left: intervals of ±2 standard errors of the squared bias, as a length; one that contains 0 reaches the bottom.
    Right: the variance with such a band; dashed: that of the choice of documents.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    x = np.arange(len(found))

    def values(name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        own = [told[name][metric] for told in found.values()]
        return np.array([m["value"] for m in own]), 2 * np.array([m["se"] or 0.0 for m in own])
    zgr = 100 * values("zgr", "enumerated")[0] ** 0.5
    bottom = max(0.05, zgr.min() / 2)
    for i, name in enumerate(names):
        style, (value, error) = {"color": PALETTE[i], "marker": MARKERS[i]}, values(name, "bias2")
        low, high = (100 * (value + sign * error).clip(0) ** 0.5 for sign in (-1, 1))
        at = x + 0.17 * (i - (len(names) - 1) / 2)
        high = high.clip(1.2 * bottom)                                        # one that lies below 0 is a stub
        left.vlines(at, low.clip(1e-9), high, color=PALETTE[i], linewidth=2.5, alpha=0.7)
        left.plot(at, high, "_", color=PALETTE[i], markersize=7)
        left.plot(at[low > 0], 100 * value[low > 0] ** 0.5, ls="", ms=5, **style)
        value, error = values(name, "variance")
        right.plot(x, value, label=name, ms=5, **style)
        right.fill_between(x, value - error, value + error, color=PALETTE[i], alpha=0.25, lw=0)
    left.plot(x, zgr, ":", color="black", lw=1.2, label="zgr, all codes enumerated")
    right.plot(x, values("documents", "variance")[0], "--", color="0.4", lw=1.2, label="choice of documents")
    left.set(ylabel="bias [% of |gradient|]", yscale="log", ylim=(bottom, None))
    right.set(ylabel="variance [|gradient|²]", yscale="log")
    for ax in (left, right):
        ax.set(xlabel="epochs of training", xticks=x, xticklabels=[str(k) for k in found])
    left.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_major_formatter("{x:g}")
    fig.suptitle(title, fontsize=10, x=0.01, ha="left")
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def hashing(found: dict, published: dict, title: str = "") -> Figure:
    """NELBO against bits, a panel for each depth of the decoder, a colour for each encoder.

    found: of `semhash.grid`; published: {"d0": {encoder: {bits: value}}}, dashed. The solid line is of the shortest
    runs, stars of longer ones.
    """
    fig, axes = plt.subplots(1, len(published), figsize=(WIDTH, 3.3), sharey=True)
    lengths = sorted({n for rows in found.values() for row in rows.values() for cell in row.values() for n in cell})
    for ax, (name, rows) in zip(axes, published.items(), strict=True):
        for i, (encoder, values) in enumerate(rows.items()):
            cells = found.get(int(name[1:]), {}).get(encoder, {})
            short = {bits: cells[bits][n] for n in lengths[:1] for bits in values if n in cells.get(bits, {})}
            long = {bits: cells[bits][n] for bits in values if (n := max(cells.get(bits, [0]))) in lengths[1:]}
            for shown, marks in ((values, {"ls": "--", "marker": MARKERS[i], "mfc": "white", "lw": 1, "ms": 5}),
                                 (short, {"marker": MARKERS[i], "ms": 5}),
                                 (long, {"ls": "", "marker": "*", "ms": 11, "mec": "white"})):
                heights = [value["value"] if isinstance(value, dict) else value for value in shown.values()]
                ax.plot([str(bits) for bits in shown], heights, color=PALETTE[i], **marks)
        ax.set(xlabel="bits", title=f"decoder depth {name[1:]}")
    axes[0].set(ylabel="NELBO [nats per document]")
    handles = [plt.Line2D([], [], color=PALETTE[i], marker=MARKERS[i], label=encoder)
               for i, encoder in enumerate(next(iter(published.values())))]
    handles.append(plt.Line2D([], [], color="0.3", ls="--", marker="o", mfc="white", label="published"))
    if lengths:
        handles.append(plt.Line2D([], [], color="0.3", marker="o", label=f"obtained, {lengths[0]} epochs"))
    if lengths[1:]:
        handles.append(plt.Line2D([], [], color="0.3", ls="", marker="*", ms=11,
                                  label=f"obtained, longer: up to {lengths[-1]}"))
    fig.suptitle(title, fontsize=10, x=0.01, ha="left")
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig
