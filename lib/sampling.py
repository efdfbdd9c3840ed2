"""Looking at a trained decoder: the five sampling modes of VAEs-Implementations, as pure functions of an autoencoder.

How blurred and how much alike its images are, in numbers, too.

Grids of images are [rows, columns, C, S, S] in [0, 1]. Noise comes from the generator alone.
"""
from pathlib import Path

import torch
from torch import Tensor

from lib import BookError
from lib.autoencoders import Autoencoder, decode, encode, evaluate, pixels
from lib.evaluate import estimate
from lib.stochastic import gaussian_kl

MODES = ("sample", "interpolate", "traverse", "reconstruct", "visualize_latent")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")       # what pytorch-fid reads


def check(z_dim: int, n_samples: int = 1, batch_size: int = 1, n_interpolate: int = 2, n_traverse: int = 2,
          traverse_range: float = 1.0, traverse_dim: int = 0) -> None:
    """Raise ValueError, in one line, if an option of the modes is out of its range: before training, not after it."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if batch_size < 1:
        raise ValueError(f"the batch size of sampling must be at least 1, got {batch_size}")
    if n_interpolate < 2:
        raise ValueError(f"n_interpolate must be at least 2, got {n_interpolate}")
    if not 0 <= traverse_dim < z_dim:
        raise ValueError(f"traverse_dim must be between 0 and {z_dim - 1}, got {traverse_dim}")
    if n_traverse < 2 or traverse_range <= 0:
        raise ValueError(f"n_traverse >= 2 and traverse_range > 0 are needed, got {n_traverse} and {traverse_range}")


def check_dims(z_dim: int, dims: list) -> None:
    """Raise ValueError, in one line, if one of the dimensions to traverse is not a number that the code has."""
    for dim in dims:
        if type(dim) is not int or not 0 <= dim < z_dim:
            raise ValueError(f"traverse_dims must be whole numbers between 0 and {z_dim - 1}, got {dim!r}")


def _codes(model: Autoencoder, n: int, generator: torch.Generator) -> Tensor:
    check(model.z_dim, n)
    return torch.randn(n, model.z_dim, generator=generator, device=generator.device)


def _decode_rows(model: Autoencoder, z: Tensor, batch_size: int) -> Tensor:
    return decode(model, z.flatten(0, 1), batch_size).unflatten(0, z.shape[:2])


def sample(model: Autoencoder, n_samples: int, generator: torch.Generator, batch_size: int = 500) -> Tensor:
    """Images of n_samples codes from N(0, I): [n_samples, 1, C, S, S]."""
    return _decode_rows(model, _codes(model, n_samples, generator)[:, None], batch_size)


def interpolate(model: Autoencoder, n_samples: int, n_interpolate: int, generator: torch.Generator,
                batch_size: int = 500) -> Tensor:
    """n_interpolate points on the line between two random codes, ends included: [n_samples, n_interpolate, C, S, S]."""
    check(model.z_dim, n_samples, batch_size, n_interpolate)
    start, end = _codes(model, n_samples, generator), _codes(model, n_samples, generator)
    t = torch.linspace(0, 1, n_interpolate, device=start.device)[None, :, None]
    return _decode_rows(model, (1 - t) * start[:, None] + t * end[:, None], batch_size)


def traverse(model: Autoencoder, n_samples: int, n_traverse: int, traverse_range: float, traverse_dim: int,
             generator: torch.Generator, batch_size: int = 500) -> Tensor:
    """Codes with dimension traverse_dim set to n_traverse values in ±traverse_range: [n_samples, n_traverse, ...]."""
    check(model.z_dim, n_samples, batch_size, 2, n_traverse, traverse_range, traverse_dim)
    z = _codes(model, n_samples, generator)[:, None].repeat(1, n_traverse, 1)
    z[:, :, traverse_dim] = torch.linspace(-traverse_range, traverse_range, n_traverse, device=z.device)
    return _decode_rows(model, z, batch_size)


def traverse_each(model: Autoencoder, dims: list[int], n_traverse: int, traverse_range: float,
                  generator: torch.Generator, batch_size: int = 500) -> Tensor:
    """One random code, a row for each of dims: that dimension set to n_traverse values in ±traverse_range.

    [len(dims), n_traverse, C, S, S]. Raises ValueError: no dims or one that the code has not, a range as in `check`.
    """
    if not dims:
        raise ValueError("there are no dimensions to traverse: name at least one")
    for dim in dims:
        check(model.z_dim, 1, batch_size, 2, n_traverse, traverse_range, dim)
    z = _codes(model, 1, generator)[:, None].repeat(len(dims), n_traverse, 1)
    for row, dim in zip(z, dims, strict=True):
        row[:, dim] = torch.linspace(-traverse_range, traverse_range, n_traverse, device=z.device)
    return _decode_rows(model, z, batch_size)


def most_used(model: Autoencoder, images: Tensor, n: int = 6) -> tuple[list[int], Tensor]:
    """The n dimensions of the code that tell most of the images, and how much each dimension does: [z_dim].

    That is its mean KL(q(z_j|x) || N(0, 1)) over uint8 images [N, C, S, S], in nats; of an AE or AAE, which have no
    q, the variance of the code.
    """
    mean, log_var = encode(model, images)
    use = gaussian_kl(mean[..., None], log_var[..., None]).mean(0) if model.variational else mean.var(0)
    return use.topk(min(n, model.z_dim)).indices.tolist(), use


def reconstruct(model: Autoencoder, images: Tensor, n_samples: int, generator: torch.Generator,
                batch_size: int = 500) -> Tensor:
    """n_samples random images (uint8 [N, C, S, S]) beside their reconstructions: [n_samples, 2, C, S, S].

    The code is a draw from q(z|x) for a variational model, the mean otherwise (VAEs-Implementations draws in both
    cases, from a variance that the AE and the AAE never train).
    """
    if not 1 <= n_samples <= len(images):
        raise ValueError(f"n_samples must be between 1 and the {len(images)} images, got {n_samples}")
    order = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    chosen = images[order[:n_samples]]
    z = evaluate(model, chosen, generator, batch_size)["z"]
    originals = (pixels(chosen) + 1) / 2
    return torch.stack([originals, decode(model, z, batch_size)], 1)


def visualize_latent(model: Autoencoder, images: Tensor, n_samples: int, generator: torch.Generator,
                     batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Means of q(z|x) [n, 2] of n random test images and their indices [n]; ValueError unless z_dim is 2."""
    if model.z_dim != 2:
        raise ValueError(f"the latent map needs z_dim = 2, this model has {model.z_dim}")
    order = torch.randperm(len(images), generator=generator, device=generator.device)[:n_samples].to(images.device)
    return encode(model, images[order], batch_size)[0], order


def decoder_map(model: Autoencoder, extent: float, n: int) -> Tensor:
    """Images on an n x n grid of z over ±extent, the largest z_2 in the first row: [n, n, C, S, S]; z_dim must be 2."""
    device = next(model.parameters()).device
    axis = torch.linspace(-extent, extent, n, device=device)
    z = torch.stack(torch.meshgrid(axis.flip(0), axis, indexing="ij")[::-1], -1)
    return _decode_rows(model, z, 500)


# ------------------------------------------------------------------------------------------------ how images look
def sharpness(images: Tensor) -> Tensor:
    """Root mean square gradient of images [N, C, S, S] in [0, 1]: [N], in units of the pixel range per pixel.

    The square of it is the mean over the image of the squared differences of neighbours, across plus down: the power
    of the image with each frequency weighted by about its square. Blur takes it away, as does loss of contrast; the
    mean absolute difference would not do: that of an edge is the same however soft it is.
    """
    return sum(images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (-1, -2)).sqrt()


def distance(images: Tensor, centre: Tensor) -> Tensor:
    """Mean squared difference per pixel of images [N, C, S, S] in [0, 1] from one image [C, S, S]: [N].

    On the [-1, 1] scale, as all squared errors of the chapter.
    """
    return 4 * (images - centre).square().mean((1, 2, 3))


def appearance(model: Autoencoder, images: Tensor, generator: torch.Generator,
               batch_size: int = 500) -> dict[str, dict]:
    """Metrics of how blurred and how diverse the model's images are beside test images, uint8 [N, C, S, S].

    sharpness_test and diversity_test: mean `sharpness` of the test images and mean `distance` from the average one of
    them. The same of N samples and of the N reconstructions (as in `reconstruct`), divided by those: 1 means as sharp
    and as diverse as the test images, 0 that all are the average one. The test images' means are taken as known in the
    errors.
    """
    centre = (images.sum(0, dtype=torch.int64) / (255 * len(images))).float()
    found: dict[str, list[Tensor]] = {}
    for part in images.split(batch_size):
        drawn = {"test": (pixels(part) + 1) / 2, "samples": sample(model, len(part), generator, batch_size)[:, 0],
                 "reconstructions": decode(model, evaluate(model, part, generator, batch_size)["z"], batch_size)}
        for name, own in drawn.items():
            found.setdefault(f"sharpness_{name}", []).append(sharpness(own))
            found.setdefault(f"diversity_{name}", []).append(distance(own, centre))
    values = {name: torch.cat(parts).double() for name, parts in found.items()}
    metrics = {"sharpness_test": estimate(values["sharpness_test"], "pixel range per pixel"),
               "diversity_test": estimate(values["diversity_test"], "squared error per pixel")}
    for name in ("sharpness_samples", "sharpness_reconstructions", "diversity_samples", "diversity_reconstructions"):
        metrics[name] = estimate(values[name] / values[f"{name.partition('_')[0]}_test"].mean(), "of the test images'")
    return metrics


def save_images(grid: Tensor, folder: Path) -> int:
    """Each row of a grid as one PNG, 0.png, 1.png, ...; returns how many. OSError if the folder cannot be written."""
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate((255 * grid).round().clamp(0, 255).to(torch.uint8).cpu()):
        strip = torch.cat(list(row), dim=-1).permute(1, 2, 0).numpy()
        Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip).save(folder / f"{i}.png")
    return len(grid)


def export_images(images: Tensor, folder: Path) -> int:
    """Each image [N, 1 or 3, H, W], uint8 or in [0, 1], as its own PNG, 0.png, 1.png, ...; returns N.

    `python -m pytorch_fid A B` compares two such folders. Images of these names are replaced. Raises BookError: the
    folder cannot be written or holds other images, which would be counted too; ValueError: other tensors, NaN.
    """
    from PIL import Image
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images to export must be [N, 1 or 3, H, W], N >= 1, got {list(images.shape)}")
    if images.dtype != torch.uint8:
        if not (images.is_floating_point() and images.isfinite().all()):
            raise ValueError("images to export must be uint8, or finite and in [0, 1]")
        images = torch.cat([(255 * part).round().clamp(0, 255).to(torch.uint8) for part in images.split(4096)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {f"{i}.png" for i in range(len(images))}
        other = next((f.name for f in folder.iterdir() if f.suffix in PICTURES and f.name not in names), None)
        if other:
            raise BookError(f"{folder} holds another image, {other}: export into an empty folder")
        for i, image in enumerate(images.cpu().movedim(1, -1).numpy()):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(folder / f"{i}.png", compress_level=1)
    except OSError as error:
        raise BookError(f"cannot write images to {folder}: {error.strerror or error}; choose another folder") from None
    return len(images)
