"""How biased the ZGR gradient of the ELBO is: measured on HVAEs so small that all codes can be enumerated."""
import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.hvae import ENCODERS, HVAE, Tanh, initialise
from lib.stochastic import zgr_at
from lib.symmetric import cross_entropy, elbo_loss, images, p_loss, training
from lib.train import Shuffled, generator


def elbo_gradients(model: HVAE, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [P] of -ELBO over the encoder's parameters, by enumeration: the exact one, and the mean of ZGR's.

    batch: uint8 [B, 1, S, S]. For models of a few bits: 2^(n0 + n1) codes an image.
    """
    dtype, x = next(model.parameters()).dtype, images(batch, model.gaussian)
    codes = torch.tensor(list(product((0.0, 1.0), repeat=sum(model.bits))), dtype=dtype, device=x.device)
    x, codes = x.to(dtype).repeat_interleave(len(codes), 0), codes.repeat(len(x), 1)
    z0, z1 = codes.split(model.bits, 1)
    order = (z0, z1) if model.kind == "ladder" else (z1, z0)

    def drawn(bit):
        bits = iter(order)
        return model.draw_q(model.encoder(x), None, lambda logits, _: bit(next(bits), logits))

    exact_draw = drawn(lambda z, _: z)
    log_q = -cross_entropy(exact_draw[2], z0) - cross_entropy(exact_draw[3], z1)
    log_p = -sum(p_loss(model, x, z0, z1)) - model.bits[0] * math.log(2)
    q, own = log_q.exp(), list(model.encoder.parameters())
    losses = (q * (log_q - log_p)).sum(), (q.detach() * sum(elbo_loss(model, x, drawn(zgr_at)))).sum()
    return tuple(torch.cat([g.flatten() for g in torch.autograd.grad(loss / len(batch), own)]) for loss in losses)


def bias(encoder: str, data: Tensor, seed: int, steps: tuple[int, ...] = (0, 100, 300)) -> list[dict]:
    """How far the mean of ZGR's gradient is from the exact one while an HVAE of 4 + 4 bits learns 4x4 thumbnails.

    data: uint8 [N, 1, 28, 28]; gradients are of the first 8 images. A row for each number of ELBO steps: bias
    |mean - exact| / |exact| and cosine, over all parameters of the encoder.
    """
    small = F.adaptive_avg_pool2d(data[:2000].float(), 4).round().to(torch.uint8)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), Tanh())
    decoder = nn.Sequential(nn.Linear(4, 16), Tanh(), nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)))
    model = HVAE(encoder, (4, 4), trunk, 16, decoder, image=(1, 4, 4), hidden=32)
    initialise(model, generator(seed, use="weights"))
    step, state = training(model, generator(seed), "elbo", lr=3e-3)
    batches, rows, done = Shuffled(small, 64, seed), [], 0
    for upto in steps:
        for t in range(done, upto):
            step(batches.batch(t))
        exact_one, mean = elbo_gradients(model.double(), small[:8])
        model.float()
        done, apart = upto, (mean - exact_one).norm() / exact_one.norm()
        rows.append({"steps": upto, "relative bias": apart.item(),
                     "cosine": F.cosine_similarity(mean, exact_one, dim=0).item()})
    return rows


def bias_table(data: Tensor, seed: int):
    """`bias` of both encoders as a pandas DataFrame."""
    import pandas as pd
    rows = [{"encoder": encoder} | row for encoder in ENCODERS for row in bias(encoder, data, seed)]
    return pd.DataFrame(rows).set_index(["encoder", "steps"])
