"""The classifier Frechet distance (CFD): the Frechet distance of features that the book's own classifier finds.

It stands in for the FID where the Inception weights are absent, and for digits it is the apter one; it is never put
beside a published FID: only orderings are compared. The classifier is trained on the labelled training images, once:
    net = classifier.load_or_train(data.load("mnist"), threshold=0.4375)      # a minute on one CPU thread, then cached
    classifier.cfd(net, samples, classifier.moments(net, images))
Obtained with seed 0, test accuracy: MNIST binarised >= 0.99, Fashion-MNIST >= 0.93; `net.recipe` says how and how well.
"""
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lib import evaluate, root, write_atomic
from lib.data import Dataset
from lib.evaluate import Moments, estimate
from lib.train import Shuffled, TrainError, fit, generator
from lib.train import device as device_named
from lib.train import precision as numerics

RECIPE = {"version": 1, "convolutions": [16, 32], "features": 128, "epochs": 10, "least_steps": 300, "batch_size": 128,
          "lr": 3e-3, "warm_up": 0.2, "shift": 1}


class Classifier(nn.Module):
    """Two convolutions and a hidden layer: images uint8 [B, C, S, S] -> logits [B, classes]; S >= 4.

    threshold: pixels / 255 above it count as 1, others as 0, so that binarised and grey images are of one kind; None:
    grey. `recipe` says how a trained one was made. Raises ValueError: image side below 4.
    """

    def __init__(self, image: tuple[int, int], classes: int, threshold: float | None = None):
        super().__init__()
        (channels, side), (a, b), d = image, RECIPE["convolutions"], RECIPE["features"]
        if side < 4:
            raise ValueError(f"the classifier needs images of side 4 at least, got {side}")
        self.image, self.threshold, self.recipe = image, threshold, {}
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(b * (side // 4) ** 2, d, bias=False), nn.BatchNorm1d(d), nn.ReLU())
        self.head = nn.Linear(d, classes)
        self.register_buffer("steps_done", torch.zeros(()))

    def initialise(self, generator: torch.Generator) -> "Classifier":
        """Draw all weights from the generator (of the CPU), He et al. 2015, and forget all training; returns self."""
        self.steps_done.zero_()
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_parameters()
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(self.head.bias)
        return self

    def features(self, images: Tensor) -> Tensor:
        """The activations [B, 128] that the last layer reads."""
        x = images.float() / 255
        x = x if self.threshold is None else (x > self.threshold).float()
        return self.trunk(x.contiguous(memory_format=torch.channels_last)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.head(self.features(images))


# ------------------------------------------------------------------------------------------------ training
def training(net: Classifier, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> tuple:
    """The step on a batch of indices into images and labels, and its state: (step, {name: item}) for `train.fit`.

    Cross-entropy [nats] of images shifted at random by up to one pixel each way; Adam, its rate rising from 0 over
    the first fifth of the steps and falling to 0 again over the others.
    """
    net.train().to(memory_format=torch.channels_last)
    rate = torch.zeros((), device=images.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True, capturable=images.is_cuda)

    def step(batch: Tensor) -> dict[str, Tensor]:
        net.steps_done += 1
        done = net.steps_done / steps
        peak = RECIPE["warm_up"]
        rate.copy_(RECIPE["lr"] * torch.minimum(done / peak, (1 - done) / (1 - peak)))
        loss = F.cross_entropy(net(_shifted(images[batch], RECIPE["shift"], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    return step, {"model": net, "optimizer": optimizer, "generator": generator}


def _shifted(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image [B, C, S, S] moved by its own random number of pixels, -by .. by, down and right; 0 comes in."""
    b, _, side, _ = images.shape
    start = torch.randint(0, 2 * by + 1, (2, b, 1), generator=generator, device=images.device)
    rows, columns = start + torch.arange(side, device=images.device)
    padded = F.pad(images, (by, by, by, by)).movedim(1, -1)
    item = torch.arange(b, device=images.device)[:, None, None]
    return padded[item, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def load_or_train(data: Dataset, threshold: float | None = None, seed: int = 0,
                  device: str | torch.device = "auto") -> Classifier:
    """The classifier of a data set's images, in evaluation mode: trained on its training half, or from the cache.

    threshold: of the binarisation, None for grey images (see `Classifier`). The cache, runs/classifier/, is keyed by
    recipe, images, labels, threshold and seed; a file there that is damaged is replaced. `net.recipe` holds the recipe,
    steps, seed, data, device, digest of the weights and test accuracy (a metric): what a record of a run should keep.
    Raises TrainError: the cache cannot be written, the training fails, no such device.
    """
    device = device_named(device) if isinstance(device, str) else device
    net = Classifier((data.train.shape[1], data.train.shape[-1]), len(data.label_names), threshold)
    setting = RECIPE | {"dataset": data.name, "sha256": data.sha256, "side": net.image[1], "threshold": threshold,
                        "seed": seed, "train_images": len(data.train), "pixels": _digest(_parts(data))}
    key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    path = root() / "runs" / "classifier" / f"{data.name}-{net.image[1]}-seed={seed}-{key}.safetensors"
    if not _read(net, path, setting):
        _train(net, data, setting, device)
        _write(net, path)
    return net.eval().to(device, memory_format=torch.channels_last)


def _train(net: Classifier, data: Dataset, setting: dict, device: torch.device) -> None:
    seed, n = setting["seed"], len(data.train)
    size = min(RECIPE["batch_size"], n)
    steps = max(RECIPE["least_steps"], RECIPE["epochs"] * (n // size))
    net.initialise(generator(seed, use="classifier weights")).to(device)
    images, labels = data.train.to(device), data.train_labels.to(device)
    step, state = training(net, images, labels, steps, generator(seed, device, use="classifier shifts"))
    batches = Shuffled(torch.arange(n, device=device), size, seed)
    fit(step, batches, steps=steps, state=state, config=setting, numerics="fp32", title=f"{data.name} classifier")
    net.recipe = setting | {"steps": steps, "device": device.type, "weights": _digest(net.state_dict().values()),
                            "accuracy": accuracy(net, data.test, data.test_labels)}


def _parts(data: Dataset) -> list[Tensor]:
    return [data.train, data.train_labels, data.test, data.test_labels]


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(net: Classifier, path: Path, setting: dict) -> bool:
    """Fill the net from the cache; False if it does not hold this classifier, whole and undamaged."""
    try:
        with safe_open(path, "pt") as file:
            net.recipe = json.loads(file.metadata()["recipe"])
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return (net.recipe["weights"] == _digest(net.state_dict().values()) and "accuracy" in net.recipe
                and {name: net.recipe[name] for name in setting} == json.loads(json.dumps(setting)))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return False


def _write(net: Classifier, path: Path) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, metadata={"recipe": json.dumps(net.recipe)}))
    except OSError as error:
        raise TrainError(f"cannot keep the trained classifier in {path.parent}: {error.strerror}; free space or make "
                         "the folder writable") from None


# ------------------------------------------------------------------------------------------------ its use
@torch.no_grad()
def _batches(net: Classifier, images: Tensor | Iterable[Tensor], layer, batch_size: int) -> Iterator[Tensor]:
    """layer(batch) of uint8 images, or chunks of them, batch by batch in fp32, the network in evaluation mode."""
    net.eval()
    device, expected = next(net.parameters()).device, (net.image[0], net.image[1], net.image[1])
    for chunk in [images] if isinstance(images, Tensor) else images:
        if chunk.dtype != torch.uint8 or chunk.shape[1:] != expected:
            raise ValueError(f"the classifier needs uint8 images [N, {', '.join(map(str, expected))}], "
                             f"got {chunk.dtype} {list(chunk.shape)}")
        for part in chunk.split(batch_size):
            with numerics("fp32", device):
                yield layer(part.to(device))


def features(net: Classifier, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Features [N, 128] of images uint8 [N, C, S, S], float32 on the net's device. ValueError: other images."""
    return torch.cat(list(_batches(net, images, net.features, batch_size)))


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> dict:
    """Fraction of images uint8 [N, C, S, S] that get their label [N], as a metric. ValueError: other images, none."""
    found = [logits.argmax(1).cpu() for logits in _batches(net, images, net, 1000)]
    return estimate((torch.cat(found) == labels.cpu()).float(), "fraction")


def moments(net: Classifier, images: Tensor | Iterable[Tensor], batch_size: int = 1000) -> Moments:
    """Moments of the features of images uint8 [N, C, S, S], or of chunks of them, for several `cfd`s against one set.

    Raises ValueError: other images, fewer than two.
    """
    return evaluate.moments(_batches(net, images, net.features, batch_size))


def cfd(net: Classifier, images_a: Tensor | Iterable[Tensor] | Moments, images_b: Tensor | Iterable[Tensor] | Moments,
        debias: bool = False) -> dict:
    """Classifier Frechet distance as a metric: images uint8 [N, C, S, S], chunks of them, or their `moments`.

    Comparable only between sets seen by the same `net` (`net.recipe["weights"]`), and never with a FID: a net of
    another seed may give half as much again, many times the se, which is of the images alone. se and debias: see
    `evaluate.frechet`. Raises ValueError: other images, fewer than two.
    """
    sets = [x if isinstance(x, Moments) else moments(net, x) for x in (images_a, images_b)]
    return evaluate.frechet(*sets, unit="CFD", debias=debias)
