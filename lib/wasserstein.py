"""Sliced Wasserstein distances between two sets of images or features. `evaluate` hands them on.

Projected to a line, two sets of points have a Wasserstein distance that sorting gives exactly; its mean over random
directions is the sliced distance (Bonneel et al. 2015, section 3). Projections are float32, means float64. The CPU
sorts with NumPy, which on processors with AVX2 or AVX-512 is many times as fast as torch.sort.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.numerics import precision

PATCH = 7                        # descriptors are 7 x 7 pixels of three channels
SMALLEST = 16                    # the coarsest level of the pyramid
MOST = 2 ** 21                   # descriptors of a set: 128 of each of 16,384 images, as in the paper
THIN = 4                         # halves of patches: every fourth patch, every fourth direction
HELD, READ = 2 ** 26, 2 ** 23    # numbers held sorted, and numbers read, at a time


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator, projections: int = 512, order: int = 1,
                       halves: int = 10, unit: str = "") -> dict:
    """Sliced Wasserstein distance of order 1 or 2 between sets a [n, ...] and b [m, ...], as a metric.

    uint8 (images) is taken on the scale [-1, 1], anything else as it is; all but the first dimension is one vector.
    (mean over `projections` random unit directions of W_p^p)^(1/p), in the units of the points; n and m may differ. In
    d dimensions a shift by v alone gives |v| / sqrt(d) at order 2. Directions and halves are drawn from the generator,
    which may be on any device: one in the same state compares all sets along the same directions.
    se: of the points, not of the directions: the standard deviation over random halves of both sets (delete-half
    jackknife of Shao and Wu 1989); None for fewer than two halves or four points. A finite sample is at a positive
    distance even from its own distribution, see `baseline`. n of the metric is the smaller set's.

    Raises ValueError: an order other than 1 and 2, no projections, sets that are empty or of other shapes, types or
    devices, values that are not finite.
    """
    _check(a, b, projections)
    if order not in (1, 2):
        raise ValueError(f"the order must be 1 or 2, got {order}")
    unit = unit or (f"W{order} of pixels in [-1, 1]" if a.dtype == torch.uint8 else f"sliced W{order}")
    chosen = _halves(len(a), len(b), halves, generator)
    with torch.no_grad(), precision("fp32", a.device):
        directions = _directions(a[0].numel(), projections, generator).to(a.device)
        found = _sliced(_vectors(a), _vectors(b), directions, order, chosen) ** (1 / order)
    return _metric(found, min(len(a), len(b)), unit)


def patch_swd(a: Tensor, b: Tensor, generator: torch.Generator, descriptors: int = 128, projections: int = 512,
              halves: int = 10) -> dict[str, dict]:
    """Sliced W1 of the patches of two sets of images uint8 [n, 3, S, S] at each scale, times 1000, as metrics.

    Karras et al. 2018, section 5: each image becomes a Laplacian pyramid, S = 64 giving the levels 64, 32, 16; of each
    level `descriptors` patches of 7 x 7 pixels at random places of each image are taken; each set's patches are brought
    to mean 0 and standard deviation 1 in each channel, so that neither a tint nor a contrast that all images share is
    seen. Named swd_64, swd_32, swd_16 (the last is of the low-pass) and swd_mean. Of a set with more than 2**21 patches
    (16,384 images of 128) fewer are taken of each image. Both sets' patches lie at the same places.
    se as in `sliced_wasserstein`, over halves of the images, of whose patches and directions every fourth is used.

    Raises ValueError: other images than those, S not 16 times a power of two, descriptors < 1; and as there.
    """
    _check(a, b, projections)
    sizes, n = _levels(a), min(len(a), len(b))
    if descriptors < 1:
        raise ValueError(f"at least one descriptor of each image is needed, got {descriptors}")
    each, places = max(1, min(descriptors, MOST // max(len(a), len(b)))), _seed(generator)
    chosen, found = _halves(len(a), len(b), halves, generator), []
    with torch.no_grad(), precision("fp32", a.device):
        for level in range(len(sizes)):
            directions = _directions(3 * PATCH ** 2, projections, generator).to(a.device)
            x, y = (_patches(images, level, each, places) for images in (a, b))
            values = [_patch_distance(x.flatten(0, 1), y.flatten(0, 1), directions)]
            for half in chosen:
                parts = (own[at.to(own.device), ::THIN].flatten(0, 1) for own, at in zip((x, y), half, strict=True))
                values.append(_patch_distance(*parts, directions[:, ::THIN]))
            found.append(1000 * torch.cat(values))
            del x, y
    named = {f"swd_{size}": values for size, values in zip(sizes, found, strict=True)}
    named["swd_mean"] = torch.stack(found).mean(0)
    return {name: _metric(values, n, "SWD x 1000") for name, values in named.items()}


def baseline(x: Tensor, generator: torch.Generator, distance: Callable = sliced_wasserstein, **options):
    """What `distance`, one of the two above, gives between random halves of one set: the floor of its values.

    Two sets of n each from one distribution are at a distance that falls as 1/sqrt(n): the halves of a set of n lie
    sqrt(2) times as far apart as two sets of n would. Raises ValueError as the distance does.
    """
    at = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    half = len(x) // 2
    return distance(x[at[:half]], x[at[half:2 * half]], generator, **options)


# ------------------------------------------------------------------------------------------------ along directions
@dataclass(frozen=True)
class _Rows:
    """Points read in parts: read(slice) -> float32 [rows, d]; n of them."""
    read: Callable[[slice], Tensor]
    n: int

    def along(self, directions: Tensor) -> Tensor:
        """Projections [g, n] on the directions [d, g]."""
        d, g = directions.shape
        found, step = directions.new_empty(g, self.n), max(1, READ // d)
        across = directions.T.contiguous()
        for i in range(0, self.n, step):
            found[:, i:i + step] = across @ self.read(slice(i, min(i + step, self.n))).T
        return found


def _vectors(x: Tensor) -> _Rows:
    def read(rows: slice) -> Tensor:
        part = x[rows].flatten(1).float()
        return part / 127.5 - 1 if x.dtype == torch.uint8 else part

    return _Rows(read, len(x))


def _sliced(a: _Rows, b: _Rows, directions: Tensor, order: int, halves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Means over the directions of W_p^p, float64 [1 + halves]: of the whole sets, then of each half."""
    halves = [tuple(at.to(directions.device) for at in half) for half in halves]
    sizes = [(a.n, b.n), *([(len(halves[0][0]), len(halves[0][1]))] if halves else [])]
    couplings = [_coupling(n, m, directions.device) for n, m in sizes]
    totals = torch.zeros(1 + len(halves), dtype=torch.float64, device=directions.device)
    for some in directions.split(max(1, HELD // max(a.n, b.n)), dim=1):
        for x, y in zip(a.along(some), b.along(some), strict=True):
            for k, (s, t) in enumerate(halves, 1):
                totals[k] += _transport(_sort(x[s]), _sort(y[t]), couplings[1], order)
            totals[0] += _transport(_sort(x), _sort(y), couplings[0], order)
    found = (totals / directions.shape[1]).cpu()
    if not found.isfinite().all():
        raise ValueError("points are not finite: look at the images or the network they come from")
    return found


def _sort(x: Tensor) -> Tensor:
    """Numbers [n] sorted, in place where NumPy does it."""
    if x.device.type != "cpu":
        return x.sort().values
    x.numpy().sort()
    return x


def _transport(a: Tensor, b: Tensor, coupling: tuple | None, order: int) -> Tensor:
    """W_p^p of sorted numbers [n] and [m], float64."""
    if coupling:
        i, j, mass = coupling
        return (a[i] - b[j]).abs().double().pow(order) @ mass
    return torch.linalg.vector_norm(a - b, order, dtype=torch.float64) ** order / len(a)


def _coupling(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """Which of n sorted points goes to which of m, and what mass [n + m at most] of it; None if each to its own."""
    if n == m:
        return None
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()    # in units of 1 / (n m)
    mass = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return ((ends - 1) // m).to(device), ((ends - 1) // n).to(device), mass.to(device)


def _directions(d: int, count: int, generator: torch.Generator) -> Tensor:
    """Unit vectors [d, count], uniform on the sphere, float32."""
    drawn = torch.randn(d, count, generator=generator, device=generator.device, dtype=torch.float64)
    return (drawn / drawn.norm(dim=0)).float()


def _halves(n: int, m: int, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Random halves of n and of m points, the same ones if n = m, where points may be paired; none if too few."""
    own, same = torch.Generator().manual_seed(_seed(generator)), n == m
    halves = []
    for _ in range(count if min(n, m) >= 4 and count > 1 else 0):
        first = torch.randperm(n, generator=own)[:n // 2]
        halves.append((first, first if same else torch.randperm(m, generator=own)[:m // 2]))
    return halves


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2 ** 31, (1,), generator=generator, device=generator.device))


def _metric(found: Tensor, n: int, unit: str) -> dict:
    se = found[1:].std().item() if len(found) > 1 else None
    return {"value": found[0].item(), "se": se, "n": n, "unit": unit}


def _check(a: Tensor, b: Tensor, projections: int) -> None:
    if a.ndim < 2 or not len(a) or not len(b) or a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
        raise ValueError("two sets of points or images of one shape and type are needed, got "
                         f"{list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"the two sets are on {a.device} and on {b.device}: move them to one device")
    if projections < 1:
        raise ValueError(f"at least one projection is needed, got {projections}")


# ------------------------------------------------------------------------------------------------ patches
def _levels(images: Tensor) -> list[int]:
    """Sizes of the pyramid's levels, finest first. ValueError: images that have none."""
    size = images.shape[-1]
    levels = [size >> k for k in range(size.bit_length()) if size >> k >= SMALLEST]
    if images.ndim != 4 or images.shape[1:] != (3, size, size) or images.dtype != torch.uint8 \
            or size != SMALLEST << max(0, len(levels) - 1):
        raise ValueError(f"patches are of images uint8 [n, 3, S, S] with S = {SMALLEST}, {2 * SMALLEST}, "
                         f"{4 * SMALLEST}, ..., got {images.dtype} {list(images.shape)}")
    return levels


def _patches(images: Tensor, level: int, each: int, seed: int) -> Tensor:
    """Patches of one level of the images: float32 [n, each, 147], the channels of a pixel side by side."""
    size = images.shape[-1] >> level
    places = torch.randint(size - PATCH + 1, (len(images), each, 2), generator=torch.Generator().manual_seed(seed))
    found = torch.empty(len(images), each * PATCH, PATCH * 3, device=images.device)
    step, lines = max(1, READ // images[0].numel() // 4), size * torch.arange(PATCH)
    for i in range(0, len(images), step):
        x = pyramid(images[i:i + step].float(), level, size > SMALLEST)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, 3)
        row, column = places[i:i + step].unbind(2)
        corner = (torch.arange(len(x))[:, None] * size + row) * size + column
        lengths = pixels.as_strided((len(pixels) - PATCH + 1, PATCH * 3), (3, 1))         # seven pixels of a row
        at = (corner[..., None] + lines).flatten().to(x.device)
        torch.index_select(lengths, 0, at, out=found[i:i + step].flatten(0, 1))
    return found.view(len(images), each, 3 * PATCH ** 2)


def _patch_distance(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Sliced W1 [1] of two sets of patches [., 147], which it normalises in place."""
    rows = []
    for own in (a, b):
        _normalise(own)
        rows.append(_Rows(own.__getitem__, len(own)))
    return _sliced(*rows, directions, 1, [])


def _normalise(patches: Tensor) -> None:
    """Bring each channel of patches [n, 147] to mean 0 and deviation 1, in place."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=patches.device)
    for part in patches.split(4096):                                         # float32 within, float64 across
        sums += torch.stack([part.sum(0), part.square().sum(0)]).double().view(2, -1, 3).sum(1)
    mean, square = sums / (len(patches) * PATCH ** 2)
    variance = square - mean.square()
    deviation = torch.where(variance > 1e-6, variance, 1.0).sqrt()           # less is the rounding of equal pixels
    patches.view(-1, PATCH ** 2, 3).sub_(mean.float()).div_(deviation.float())


def pyramid(images: Tensor, level: int, band: bool = True) -> Tensor:
    """A level of the Laplacian pyramid of images float [n, c, s, s]: [n, c, s', s'] with s' = s / 2^level.

    Burt and Adelson 1983 with the binomial filter 1 4 6 4 1 and mirrored borders, as Karras et al. 2018 have it: images
    halved `level` times, less what the next halving keeps of them if it is to be a band-pass.
    """
    for _ in range(level):
        images = _halved(images)
    if not band:
        return images
    up = 2 * _blur(images.shape[-1], images)[:, ::2]
    return images - up @ _halved(images) @ up.T


def _halved(x: Tensor) -> Tensor:
    down = _blur(x.shape[-1], x)[::2]
    return down @ x @ down.T


def _blur(size: int, like: Tensor) -> Tensor:
    """The filter along a line as a matrix [size, size]; the borders are mirrored without repeating the edge."""
    lines = F.pad(torch.eye(size)[:, None], (2, 2), "reflect")
    return F.conv1d(lines, torch.tensor([[[1.0, 4.0, 6.0, 4.0, 1.0]]]) / 16)[:, 0].T.to(like)
