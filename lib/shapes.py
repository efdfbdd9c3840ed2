"""The drawing of the embedded data set `shapes`: scenes whose factors are known."""
import numpy as np
import torch
from torch import Tensor


def shapes(n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes of one coloured shape on a coloured ground: uint8 [n, 3, 64, 64] and their factors, each [n].

    Factors: shape (0 square, 1 disc, 2 triangle), x and y of the centre in [-0.5, 0.5], radius in [0.2, 0.45] (half
    image widths), angle in radians, hue and ground hue in [0, 1). Edges are one pixel soft.
    """
    rng = np.random.default_rng(seed)
    drawn = {"shape": rng.integers(0, 3, n).astype(np.float32), **{
        name: rng.uniform(low, high, n).astype(np.float32) for name, low, high in (
            ("x", -0.5, 0.5), ("y", -0.5, 0.5), ("radius", 0.2, 0.45), ("angle", 0, 2 * np.pi),
            ("hue", 0, 1), ("ground", 0, 1))}}
    factors = {name: torch.from_numpy(value) for name, value in drawn.items()}
    return torch.cat([draw({k: v[i:i + 256] for k, v in factors.items()}) for i in range(0, n, 256)]), factors


def draw(f: dict[str, Tensor]) -> Tensor:
    """Scenes uint8 [n, 3, 64, 64] of the factors, each [n]."""
    axis = (torch.arange(64) + 0.5) / 32 - 1
    dx, dy = axis[None, None, :] - f["x"][:, None, None], axis[None, :, None] - f["y"][:, None, None]
    cos, sin, r = (v[:, None, None] for v in (f["angle"].cos(), f["angle"].sin(), f["radius"]))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    corners = torch.tensor([0.0, 2.0944, 4.1888])              # the triangle is the meet of three half-planes
    sides = u * corners.cos()[:, None, None, None] + v * corners.sin()[:, None, None, None]
    distance = torch.stack([torch.maximum(u.abs(), v.abs()) - 0.8 * r, (u * u + v * v).sqrt() - r,
                            sides.amax(0) - 0.6 * r])
    inside = (0.5 - 32 * distance[f["shape"].long(), torch.arange(len(r))]).clamp(0, 1)[:, None]
    image = inside * _colour(f["hue"], 0.95) + (1 - inside) * _colour(f["ground"], 0.45)
    return (255 * image).round().to(torch.uint8)


def _colour(hue: Tensor, value: float) -> Tensor:
    """Hue in [0, 1) at saturation 0.75 -> RGB [n, 3, 1, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    rgb = value * (1 - 0.75 * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]
