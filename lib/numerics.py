"""Devices, sources of randomness, precision of the steps, the optimizer."""
import contextlib
import functools
import hashlib

import torch

from lib.checkpoint import TrainError

PRECISIONS = ("fp32", "tf32", "bf16")


def device(name: str = "auto") -> torch.device:
    """`auto`: CUDA if there is one, else the CPU. TrainError if the device asked for is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise TrainError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("device 'cuda' was asked for but this machine has no CUDA GPU: use auto or cpu")
    return torch.device(name)


def generator(seed: int, device: torch.device | str = "cpu", use: str = "noise") -> torch.Generator:
    """A source of randomness on the device, independent for every seed and use ("weights", "noise", ...).

    Seed and use are hashed to 32 bits: the CPU generator ignores higher ones. Give the noise to `fit` in `state`.
    """
    digest = hashlib.sha256(f"{seed}/{use}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


@contextlib.contextmanager
def precision(name: str, device: torch.device):
    """Numerics of the steps: fp32; tf32 (matrix products on CUDA, the same as fp32 on the CPU); bf16 (autocast)."""
    if name not in PRECISIONS:
        raise TrainError(f"unknown precision {name!r}: use one of {', '.join(PRECISIONS)}")
    products = _tf32(name != "fp32") if device.type == "cuda" else _onednn()
    # autocast would keep its copies of the weights over the steps that change them
    with products, torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
        yield


@contextlib.contextmanager
def _tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def _onednn():
    """Matrix products of the CPU by oneDNN where it is as exact as MKL: twice as fast on AMD, where MKL has no AVX-512.

    PyTorch takes oneDNN for float32 products only if it may round to bf16, which oneDNN does only on CPUs with AMX.
    """
    if not _onednn_is_exact():
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def _onednn_is_exact() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)            # not in versions of torch before 2.9
    if not hasattr(matmul, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 128, 128, generator=source)
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        error = (a @ b - (a.double() @ b.double())).abs().max().item()
    finally:
        matmul.fp32_precision = before
    return error < 1e-4                                                # float32: 1e-5; bf16: 1e-1


def adam(parameters, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    """Adam in its fused form, otherwise at PyTorch's defaults. Raises ValueError if lr <= 0."""
    if lr <= 0:
        raise ValueError(f"the learning rate must be positive, got {lr}")
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True, capturable=parameters[0].is_cuda)
