"""Images of the GAN's ground truth, of its reconstructions and of the models trained on it, compared (lib/dcgan.py)."""
import torch
from torch import Tensor

from lib import dcgan
from lib.data import Dataset
from lib.evaluate import exact


def samples(net: dcgan.Generator, n: int, noise: torch.Generator) -> Tensor:
    """Image means of n codes z ~ N(0, I): [n, 3, 64, 64] in [0, 1]."""
    z = torch.randn(n, net.nz, generator=noise, device=noise.device)
    return dcgan.generate(net, z).add(1).div(2).clamp(0, 1)


def against_real(net: dcgan.Generator, images: Dataset, n: int, noise: torch.Generator) -> dict[str, dict]:
    """What celeba-gan measures of n generated images."""
    drawn = samples(net, min(n, len(images.test)), noise)
    spread = (drawn - drawn.mean(0)).square().mean().sqrt()
    return {"spread": exact(spread, "of the pixels' range")}
