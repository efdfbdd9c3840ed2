"""The GAN that is to be the ground truth: the plain loop beside the book's step.

The plain loop follows PyTorch's DCGAN tutorial: networks in sequence that end in a sigmoid, binary cross-entropy with
tensors of labels, images from a DataLoader that turns them to floats one by one. The generator's loss is differentiated
by the discriminator's weights, too, and what comes of it thrown away. The book's images lie on the device as they are.
"""
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import looped
from lib import dcgan, ganchain, train

SETTINGS = {"batch": 32, "nz": 100, "ngf": 64, "ndf": 64, "lr": 2e-4, "workers": 0, "dataset": "celeba", "seed": 1,
            "item_every": 1}
CUDA = {"batch": 128, "workers": 2}
METRIC = "loss_d"
AIMS = []


def data(settings: dict) -> Tensor:
    """The training images, uint8 [N, 3, 64, 64]. Raises DataError: not there, or not of 64x64 pixels in colour."""
    return ganchain.images({"dataset": settings["dataset"], "crop": "resize-centre"}).train


def book(settings: dict, images: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: both networks by torch.compile.

    Raises ValueError: sizes < 1, lr not positive.
    """
    weights = train.generator(settings["seed"], use="weights")
    net = dcgan.initialise(dcgan.Generator(settings["nz"], settings["ngf"]), weights).to(device)
    discriminator = dcgan.initialise(dcgan.Discriminator(settings["ndf"]), weights).to(device)
    step, state = dcgan.gan_step(net, discriminator, train.generator(settings["seed"], device), settings["lr"])
    if compiled:
        net.compile()
        discriminator.compile()
    batches = train.Shuffled(images.to(device), settings["batch"], settings["seed"])
    return {"step": step, "state": state, "batches": batches, "config": {}}


# ------------------------------------------------------------------------------------------------ the plain loop
class Images(Dataset):
    """Images one by one, float [3, 64, 64] in [-1, 1], of uint8 [N, 3, 64, 64]."""

    def __init__(self, data: Tensor):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Tensor:
        return self.data[i].float() / 127.5 - 1


def loader(data: Tensor, size: int, workers: int, pinned: bool) -> Iterator[Tensor]:
    """Batches of the images, float [size, 3, 64, 64] on the CPU, epoch after epoch."""
    parts = DataLoader(Images(data), size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned,
                       persistent_workers=workers > 0)
    while True:
        yield from parts


def feeds(settings: dict, device: torch.device) -> dict:
    """What the plain loop may be fed by: its name -> (data, batch size) -> batches. Raises ValueError: workers < 0."""
    if settings["workers"] < 0:
        raise ValueError(f"workers must be at least 0, got {settings['workers']}")
    name = f"DataLoader, image by image, {settings['workers'] or 'no'} workers"
    return {name: partial(loader, workers=settings["workers"], pinned=device.type == "cuda")}


def generator(nz: int, ngf: int) -> nn.Sequential:
    """z [B, nz, 1, 1] -> images [B, 3, 64, 64] in [-1, 1]."""
    layers = [nn.ConvTranspose2d(nz, 8 * ngf, 4, bias=False)]
    for a, b in pairwise([8 * ngf, 4 * ngf, 2 * ngf, ngf, 3]):
        layers += [nn.BatchNorm2d(a), nn.ReLU(True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    return nn.Sequential(*layers, nn.Tanh())


def trunk(ndf: int) -> list[nn.Module]:
    """Images [B, 3, 64, 64] -> [B, 8 ndf, 4, 4]."""
    layers = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for a, b in pairwise([ndf, 2 * ndf, 4 * ndf, 8 * ndf]):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
    return layers


def plain(settings: dict, images: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` and returns the logged metrics, {name: number} each."""
    torch.manual_seed(settings["seed"])
    net = generator(settings["nz"], settings["ngf"]).to(device)
    discriminator = nn.Sequential(*trunk(settings["ndf"]), nn.Conv2d(8 * settings["ndf"], 1, 4, bias=False),
                                  nn.Sigmoid()).to(device)
    optimizer_g, optimizer_d = (torch.optim.Adam(part.parameters(), lr=settings["lr"], betas=(0.5, 0.999))
                                for part in (net, discriminator))
    criterion = nn.BCELoss()

    def step(batch: Tensor) -> dict[str, Tensor]:
        real = batch.to(device, non_blocking=True)
        label = torch.ones(len(real), device=device)
        discriminator.zero_grad()
        d_real = discriminator(real).view(-1)
        loss_real = criterion(d_real, label)
        loss_real.backward()
        fake = net(torch.randn(len(real), settings["nz"], 1, 1, device=device))
        label.fill_(0)
        d_fake = discriminator(fake.detach()).view(-1)
        loss_fake = criterion(d_fake, label)
        loss_fake.backward()
        optimizer_d.step()

        net.zero_grad()
        label.fill_(1)
        d_fake_after = discriminator(fake).view(-1)
        loss_g = criterion(d_fake_after, label)
        loss_g.backward()
        optimizer_g.step()
        return {"loss_d": loss_real + loss_fake, "loss_g": loss_g, "d_real": d_real.mean(), "d_fake": d_fake.mean(),
                "d_fake_after": d_fake_after.mean()}

    return looped(step, batches, settings["item_every"]), nn.ModuleList([net, discriminator])
