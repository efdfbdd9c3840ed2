"""Not a test: small networks and runs of the GAN as ground truth, written out plainly too, for the tests of them.

As a script: usage small_gan.py FOLDER SEED; a GAN and a joint training, killed at random and resumed (killed_training).
"""
import json
import os
import random
import sys
from pathlib import Path

import killed_training
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lib import data, dcgan, ganchain, runs, train
from lib.train import generator

CPU = torch.device("cpu")
NZ, NGF, NDF = 4, 2, 3
SMALL = {"celeba-gan": {"nz": NZ, "ngf": NGF, "ndf": NDF, "batch_size": 4, "epochs": 2},
         "celeba-encoder": {"batch_size": 4, "steps": 5, "log_every": 2, "checkpoint_every": 3},
         "celeba-joint": {"batch_size": 4, "steps": 5, "log_every": 2, "checkpoint_every": 3}}


def faces(n=24, seed=0):
    """Random images, six batches of four."""
    x = torch.randint(256, (n + 8, 3, 64, 64), generator=generator(seed, use="images")).to(torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    return data.Dataset("shapes", x[:n], x[n:], none, none, (), "0" * 64)


def lively(net, seed=1):
    """A network in whose outputs every weight and running statistic shows: none is small, 0 or 1."""
    noise = generator(seed, use="lively")
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                inputs = part.in_channels * (4 if isinstance(part, nn.ConvTranspose2d) else 16)
                part.weight.copy_(torch.randn(part.weight.shape, generator=noise) / inputs ** 0.5)
                if part.bias is not None:
                    part.bias.copy_(0.3 * torch.randn(part.bias.shape, generator=noise))
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low in ((part.weight, 0.7), (part.bias, -0.3), (part.running_mean, -0.3),
                                    (part.running_var, 0.5)):
                    tensor.copy_(low + 0.6 * torch.rand(tensor.shape, generator=noise))
    return net


def networks(seed=1, nz=NZ, ngf=NGF, ndf=NDF):
    """A generator, a discriminator and an encoder."""
    made = dcgan.Generator(nz, ngf), dcgan.Discriminator(ndf), dcgan.Encoder(nz, ndf)
    return [lively(net, 10 * seed + i) for i, net in enumerate(made)]


# ------------------------------------------------------------------------------------------------ written out, float64
def _like(net, *layers):
    """The layers in float64 with the network's weights and buffers, taken in order."""
    plain = nn.Sequential(*layers).double()
    values = list(net.state_dict().values())
    assert len(values) == len(plain.state_dict())
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    return plain.train(net.training)


def plain_generator(net, nz=NZ, n=NGF):
    """[B, nz, 1, 1] -> [B, 3, 64, 64]."""
    return _like(
        net, nn.ConvTranspose2d(nz, 8 * n, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * n), nn.ReLU(),
        nn.ConvTranspose2d(8 * n, 4 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * n), nn.ReLU(),
        nn.ConvTranspose2d(4 * n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.ReLU(),
        nn.ConvTranspose2d(2 * n, n, 4, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU(),
        nn.ConvTranspose2d(n, 3, 4, 2, 1, bias=False), nn.Tanh())


def _trunk(n):
    return (nn.Conv2d(3, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * n), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * n, 8 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(8 * n), nn.LeakyReLU(0.2))


def plain_discriminator(net, n=NDF):
    """[B, 3, 64, 64] -> probabilities [B, 1, 1, 1]."""
    return _like(net, *_trunk(n), nn.Conv2d(8 * n, 1, 4, 1, 0, bias=False), nn.Sigmoid())


def plain_encoder(net, nz=NZ, n=NDF):
    """[B, 3, 64, 64] -> means, then log sigmas, [B, 2 nz, 1, 1]."""
    return _like(net, *_trunk(n), nn.Conv2d(8 * n, 2 * nz, 4, 1, 0))


def assert_close(net, plain, rtol=1e-3, atol=2e-5):
    """Weights and running statistics of a network and of its plain counterpart."""
    for (name, value), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value.double(), other.double(), rtol=rtol, atol=atol,
                                   msg=lambda said, name=name: f"{name}: {said}")


# ------------------------------------------------------------------------------------------------ steps and runs
def steps(kind, device="cpu", seed=1, batch=4, lr=2e-3, **sizes):
    """The arguments of `fit` for the step of a kind: gan, encoder or joint."""
    net, discriminator, encoder = (each.to(device) for each in networks(seed, **sizes))
    noise = generator(seed, device)
    if kind == "gan":
        step, state = dcgan.gan_step(net, discriminator, noise, lr)
        return {"step": step, "state": state, "batches": train.Shuffled(faces().train.to(device), batch, seed),
                "config": {}}
    if kind == "encoder":
        step, state = dcgan.encoder_step(net, encoder, noise, lr)
    else:
        decoder = dcgan.Generator(net.nz, sizes.get("ngf", NGF)).to(device)
        decoder.load_state_dict(net.state_dict())
        step, state = dcgan.joint_step(net, encoder, decoder, noise, lr)
    return {"step": step, "state": state, "batches": ganchain.rows(batch, torch.device(device)), "config": {}}


def run(experiment, folder, preset="", **changed):
    """A run under way, with small parameters."""
    values = runs.check(experiment, SMALL.get(experiment, {}) | {"device": "cpu", "precision": "fp32"} | changed)
    runs.make_folder(folder)
    return runs.Run(experiment, "default", preset, values, folder, {"commit": "unknown", "dirty": True}, added=True)


def job(own, stage=None):
    """The arguments of `fit` of a run, as its notebook has them."""
    if own.experiment == "celeba-gan":
        return ganchain.gan(own.parameters, faces(), CPU, own.folder)
    make = {"celeba-encoder": ganchain.encoder, "celeba-joint": ganchain.joint}[own.experiment]
    return make(own.parameters, stage, CPU, own.folder)


def learn(experiment, folder, before="", epoch=0, **changed):
    """Train a run from the folder before it, as its notebook does; returns its history and state."""
    own = run(experiment, folder, **changed)
    stage = ganchain.before(own, before, epoch) if experiment in ganchain.BEFORE else None
    made = job(own, stage)
    history = train.fit(**made, **ganchain.options(own.parameters, made))
    own.save({}, history=history, **(ganchain.origin(own, stage) if stage else {"dataset": faces()}))
    return history, made["state"]


def weights(path, *names):
    """Tensors of a checkpoint, those of some parts of it if named."""
    found = load_file(path / "latest.safetensors")
    return {key: value for key, value in found.items() if not names or key.partition("/")[0] in names}


def assert_same(one, other, told=""):
    """Two folders hold the same checkpoints and pictures, to the bit, but for who made them and when."""
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")
                    if path.suffix in (".safetensors", ".png")) for folder in (one, other)]
    assert files[0] == files[1] and len(files[0]) > 3, f"{files}\n{told}"
    for name in files[0]:
        if name.endswith(".png"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name}\n{told}"
            continue
        a, b = (load_file(folder / name) for folder in (one, other))
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert a.keys() == b.keys() and not different, f"{name}: {different}\n{told}"
        for key in ("step", "history", "window", "best", "config"):
            assert meta(one / name).get(key) == meta(other / name).get(key), f"{name}: {key}\n{told}"


def meta(path):
    """What a checkpoint says of itself."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"])


# ------------------------------------------------------------------------------------------------ killed trainings
STEPS = 36                                                                  # more than the kills leave undone


usual = killed_training.replica


def doomed(kind, seed, folder):
    """What killed_training trains into <top>/<kind>/0: a run's job; the encoder of a joint training is in <top>/.."""
    if kind not in ("gan", "joint"):
        return usual(kind, seed, folder)
    own = run(f"celeba-{kind}", folder, resume="auto")
    return job(own, ganchain.before(own, folder.parents[2] / "encoder") if kind == "joint" else None)


killed_training.KINDS |= {"gan": ["gan"], "joint": ["joint"]}
killed_training.replica = doomed


def main():
    """Kill each training three times, once of them while it writes, then let it end."""
    folder, rng, ganchain.LOOKED_AT = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 12
    for kind in ("gan", "joint"):
        for i in range(4):
            where = {} if i == 3 else {"die_at_write": rng.randint(1, 8)} if i == 1 else {
                "die_at": rng.randint(1, 8) if i else rng.randint(7, 12)}
            child = os.fork()
            if child == 0:
                killed_training.fit(kind, folder / kind, "auto", stop=STEPS, **where)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            print(kind, where, "->", "killed" if os.WIFSIGNALED(status) else f"exit {status}", flush=True)


if __name__ == "__main__":
    main()
