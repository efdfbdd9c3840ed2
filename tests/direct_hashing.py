"""Not a test: semantic hashing straight from its definitions, dense and in float64, and small models of it."""
import itertools
import warnings

import torch
from torch import nn

from lib import bags, documents, semhash
from lib.train import generator

PARAMETERS = {"dataset": "topics", "encoder": "e1", "input": "", "bits": 5, "decoder_depth": 0, "hidden": 8,
              "estimator": "disarm", "kl": "sampled", "epochs": 2, "finetune_epochs": 0, "finetune_estimates": 2,
              "batch_size": 300, "lr": 3e-3, "seed": 1, "precision": "tf32", "replicas": 1}


def sparse(counts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                        # sparse CSR is in beta
        return counts.to_sparse_csr()


def some_counts(n, words, mean=0.4, seed=1):
    """Counts of which the first and the last document have none."""
    counts = torch.poisson(torch.full((n, words), mean), generator=generator(seed))
    counts[[0, -1]] = 0
    return counts


def corpus(counts, dense=False, smoothing=None):
    """A corpus and its x = c + s, dense in float64."""
    s = documents.smoothing(sparse(counts)) if smoothing is None else smoothing
    return bags.Corpus(sparse(counts), s, dense=dense), counts.double() + s.double()


def network(words, bits, encoder="e1", depth=0, hidden=6, reads="", scale=1.0):
    """A model whose weights are `scale` times what they start with."""
    model = semhash.SemanticHashing(words, bits, encoder, depth, hidden, reads)
    semhash.initialise(model, generator(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


# ------------------------------------------------------------------------------------------------ direct formulas
def direct_logits(model, x, reads):
    """Logits of q(z|x) for dense x [N, V], straight from the weights in float64."""
    given = x if reads == "counts" else x / x.sum(1, keepdim=True)
    y = given @ model.words_in.weight.double() + model.words_in.bias.double()
    for layer in model.code if isinstance(model.code, nn.Sequential) else []:
        y = nn.functional.leaky_relu(y, 0.01) if isinstance(layer, nn.LeakyReLU) else direct_linear(layer, y)
    return y


def direct_linear(layer, x):
    return x @ layer.weight.double().T + layer.bias.double()


def direct_log_p(model, z):
    """log p(w|z) of all words for bits [..., b]."""
    for layer in model.hidden:
        z = nn.functional.leaky_relu(z, 0.01) if isinstance(layer, nn.LeakyReLU) else direct_linear(layer, z)
    logits = direct_linear(model.words_out, z)
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def direct_rec(model, x, z):
    """sum_w x_w log(f_w / p_w(z)), nats per document."""
    f = x / x.sum(-1, keepdim=True)
    return (x * (f.log() - direct_log_p(model, z))).sum(-1)


def direct_kl(logits):
    q = torch.sigmoid(logits)
    return sum((p * (2 * p).log()).nan_to_num() for p in (q, 1 - q)).sum(-1)


def all_codes(bits):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=torch.float64)


def probabilities(logits):
    """q(z|x) of all codes: [N, b] -> [N, 2^b]."""
    z, p = all_codes(logits.shape[-1]), torch.sigmoid(logits)[:, None]
    return torch.where(z == 1, p, 1 - p).prod(-1)


def enumerated(model, x, reads):
    """NELBO [N] with the expectation over all codes."""
    logits = direct_logits(model, x, reads)
    rec = torch.stack([direct_rec(model, x, z.expand(len(x), -1)) for z in all_codes(model.bits)], 1)
    return (probabilities(logits) * rec).sum(1) + direct_kl(logits)
