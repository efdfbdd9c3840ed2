"""Codes of more than two dimensions as points in the plane."""
import warnings

import torch
from torch import Tensor


def umap(z: Tensor, neighbours: int = 30, seed: int = 0) -> Tensor:
    """UMAP of codes z [N, d] in the plane: float32 [N, 2] on the CPU, the middle of its box at the origin.

    McInnes, Healy and Melville 2018; neighbours: n_neighbors, 30 in the TensorFlow port, the rest at umap-learn's
    defaults. On one thread, so that the same codes and seed give the same points; distances between far groups, axes
    and units mean nothing. On one core of a small machine 2,000 codes take 4 s and 10,000 take 10 s; the first call of
    a process compiles for 10 s more, above 4,096 codes for 25 s. Raises ValueError: z not [N, d] or not finite,
    neighbours < 2, no more codes than neighbours.
    """
    if z.ndim != 2 or not z.shape[1]:
        raise ValueError(f"codes to embed must be [N, d], got {list(z.shape)}")
    if neighbours < 2:
        raise ValueError(f"umap needs at least 2 neighbours, got {neighbours}")
    if len(z) <= neighbours:
        raise ValueError(f"umap with {neighbours} neighbours needs more than {neighbours} codes, got {len(z)}: "
                         "embed more codes or ask for fewer neighbours")
    z = z.detach().cpu().float()
    if not z.square().sum(1).isfinite().all():
        raise ValueError("the codes to embed, or their squares, are not finite: look at the images or the encoder they "
                         "come from")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")            # of TensorFlow, groups far apart, numba: nothing to act on
        from umap import UMAP
        found = UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(z.numpy())
    points = torch.from_numpy(found)
    return points - (points.amin(0) + points.amax(0)) / 2
