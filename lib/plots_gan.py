"""Figures of the GAN as ground truth (lib/ganchain.py, lib/gandistance.py)."""
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots import WIDTH, canvas


def progress(steps: list[int], pages: Tensor, title: str = "") -> Figure:
    """A row of images for each number of steps: pages [rows, columns, 3, S, S] in [0, 1]."""
    picture = canvas(pages)
    height = 0.9 * WIDTH * picture.shape[0] / picture.shape[1] + 0.3
    fig, ax = plt.subplots(figsize=(WIDTH, height))
    ax.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    side = pages.shape[-1] + 2
    ax.set(xticks=[], yticks=[i * side + side / 2 for i in range(len(steps))], yticklabels=[f"{n:,}" for n in steps],
           ylabel="steps", title=title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig


def rows(images: dict[str, Tensor], title: str = "") -> Figure:
    """A named row of images for each kind: {name: [n, 3, S, S] in [0, 1]}, column by column the same image."""
    grid = torch.stack([own.cpu() for own in images.values()])
    picture = canvas(grid)
    fig, ax = plt.subplots(figsize=(WIDTH, 0.85 * WIDTH * picture.shape[0] / picture.shape[1] + 0.35))
    ax.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    side = grid.shape[-1] + 2
    ax.set(xticks=[], yticks=[(i + 0.5) * side for i in range(len(images))], yticklabels=list(images), title=title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig
