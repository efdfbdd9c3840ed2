"""The network of the Frechet inception distance: pytorch-fid's InceptionV3, on images in memory.

Heusel et al. 2017; weights and resizing are pytorch-fid's, so that the FID is the one of `python -m pytorch_fid`.
"""
import io
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lib import data
from lib.train import device as device_named
from lib.train import precision

FILE = next(iter(data.WEIGHTS["inception"].files))
DIMS = (64, 192, 768, 2048)


def available() -> bool:
    """True if the weights are on this machine (data folders or torch's hub cache); nothing is downloaded or read."""
    return data.find("inception") is not None


def load(device: str | torch.device = "auto", dims: int = 2048) -> nn.Module:
    """pytorch-fid's InceptionV3 up to its layer of `dims` features (2048: the FID's), in evaluation mode.

    Weights are found, or downloaded, and checked as `data.fetch` says. Raises DataError: no weights, or corrupt ones;
    ValueError: no such layer.
    """
    if dims not in DIMS:
        raise ValueError(f"the Inception network has layers of {', '.join(map(str, DIMS))} features, not {dims}")
    folder = data.find("inception") or data.fetch("inception")
    weights = torch.load(io.BytesIO(data.read_checked("inception", folder, FILE)), "cpu", weights_only=True)
    from pytorch_fid import inception  # imports torchvision: slow

    # Its InceptionV3() downloads, unpickles and checks nothing: it is given the weights read here instead.
    with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: weights):
        net = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    device = device_named(device) if isinstance(device, str) else device
    return net.eval().to(device, memory_format=torch.channels_last)


@torch.no_grad()
def features(net: nn.Module, images: Tensor | Iterable[Tensor], batch_size: int = 50) -> Iterator[Tensor]:
    """Features [B, dims] of images uint8 [N, C, H, W] (or chunks of them), batch by batch, float32 on the net's device.

    C = 1 is repeated to three channels, as a grey PNG is read. Raises ValueError: other images, or batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    device = next(net.parameters()).device
    for chunk in [images] if isinstance(images, Tensor) else images:
        if chunk.dtype != torch.uint8 or chunk.ndim != 4 or chunk.shape[1] not in (1, 3):
            raise ValueError(f"the FID needs uint8 images [N, 1 or 3, H, W], got {chunk.dtype} {list(chunk.shape)}")
        for part in chunk.split(batch_size):
            x = (part.to(device).float() / 255).expand(-1, 3, -1, -1)
            with precision("fp32", device):
                yield net(x)[0].mean((2, 3))
