"""The four notebooks of a GAN as ground truth: celeba-gan, -encoder, -joint and -fid, and what each measures.

Each starts from the run folder of the one before. A checkpoint carries what later stages need of earlier ones: the
ground truth (the GAN's generator), its discriminator, whose features compare images, and the encoder of stage 2.
"""
import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lib import checkpoint, data, dcgan, root, runs
from lib.album import Album
from lib.data import DataError, Dataset
from lib.stochastic import diagonal_log_prob
from lib.train import Shuffled, Whole, device, fit, generator, precision

PICTURES, LOOKED_AT = 20, 250                                 # images of the album, pairs of the validation
BEFORE = {"celeba-encoder": "celeba-gan", "celeba-joint": "celeba-encoder", "celeba-fid": "celeba-joint"}
LEARNT_FROM = {"celeba-gan": ("dataset", "crop", "nz", "ngf", "ndf", "batch_size", "lr", "seed", "precision"),
               "celeba-encoder": ("batch_size", "lr", "last_layer", "sigma", "seed", "precision"),
               "celeba-joint": ("batch_size", "lr", "seed", "precision")}
CURVES = {"celeba-gan": {"loss [nats per image]": {"loss_d": "discriminator", "loss_g": "generator"},
                         "probability of being real": {"d_real": "real images", "d_fake": "generated",
                                                       "d_fake_after": "generated, after the step"}},
          "celeba-encoder": {"−log q(z|x) [nats per image]": {"loss": "−log q(z|x)"},
                             "of a dimension of z": {"error": "squared error of the mean", "sigma": "sigma"}},
          "celeba-joint": {"ELBO [nats per image]": {"elbo_running": "running mean", "val_elbo": "fixed images"},
                           "KL [nats per image]": {"kl": "KL"}},
          "drift": {"decoder less truth, r.m.s.": {"drift": "pixels in [-1, 1]"},
                    "aggregate posterior": {"moment_1": "r.m.s. of E z", "moment_2": "mean of E z²"}}}


# ------------------------------------------------------------------------------------------------ the stage before
@dataclass(frozen=True)
class Stage:
    """A complete run of a stage: its folder, its results.json, its checkpoint and the configuration in that."""
    folder: Path
    record: dict
    path: Path
    config: dict


def before(run: runs.Run, folder: str | Path, epoch: int = 0) -> Stage:
    """The stage before the run's own, from its run folder (from the checkout's top if relative).

    "": a run at its notebook's defaults, which is made first; not with a preset. epoch: of a GAN, the one whose kept
    weights are taken; 0 is the last. Raises RunError: no such folder, not complete, of another
    experiment, without weights or that epoch, a corrupt checkpoint, "" with a preset.
    """
    experiment = BEFORE[run.experiment]
    short = experiment.removeprefix("celeba-")
    if not folder:
        if run.preset:
            raise runs.RunError(f"{run.experiment} starts from a run of {experiment}: give its folder, --set "
                                f"{short}=runs/{experiment}/...")
        folder = _smoke(run, experiment)
    path = root() / Path(folder).expanduser()
    if not (path / "results.json").is_file():
        what = "is not complete" if path.is_dir() else "does not exist"
        raise runs.RunError(f"the run folder {path} {what}: end `python -m lib run {experiment}` first, and give its "
                            f"folder as {short}")
    record = runs.read(path / "results.json")
    if record["experiment"] != experiment:
        raise runs.RunError(f"{path} holds a run of {record['experiment']}, {run.experiment} starts from one of "
                            f"{experiment}")
    weights = path / (f"epochs/{epoch:03}" if epoch else "") / "latest.safetensors"
    if not weights.is_file():
        kept = [int(one.parent.name) for one in sorted(path.glob("epochs/[0-9][0-9][0-9]/latest.safetensors"))]
        raise runs.RunError(f"{path} holds no weights" + (f" of epoch {epoch}; there are {kept}" if epoch and kept else
                            f": make them again with `{record['command']}`"))
    try:
        return Stage(path, record, weights, checkpoint.read_meta(weights)["config"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise runs.RunError(f"checkpoint {weights} cannot be read ({error}): make it again with "
                            f"`{record['command']} --again`") from None


def _smoke(run: runs.Run, experiment: str) -> Path:
    """The folder, inside the run's own, of a run of the experiment at its notebook's defaults, which is made now.

    If the run is resumed and the folder is complete, it is the one that the run began with.
    """
    own = runs.Run(experiment, "default", "", runs.check(experiment, {}), run.folder / experiment, run.git, added=True)
    if run.parameters.get("resume") and (own.folder / "results.json").is_file():
        return own.folder
    runs.make_folder(own.folder)
    values, where = own.parameters, device(run.parameters["device"])
    if experiment == "celeba-gan":
        faces = images(values)
        job, more = gan(values, faces, where, own.folder), {"dataset": faces}
    else:
        stage = before(own, "")
        make = {"celeba-encoder": encoder, "celeba-joint": joint}[experiment]
        job, more = make(values, stage, where, own.folder), origin(own, stage)
    fit(**job, **options(values, job))
    own.save({}, **more)
    return own.folder


def images(parameters: dict) -> Dataset:
    """The 64x64 RGB images that the parameters `dataset` and `crop` name. DataError: others, or see `data.load`."""
    name = parameters["dataset"]
    if name not in ("celeba", "shapes"):
        raise DataError(f"the GAN is for 64x64 images in colour, got {name!r}: choose celeba, or shapes (embedded)")
    return data.load(name, 64, parameters["crop"] if name == "celeba" else "")


def options(parameters: dict, job: dict) -> dict:
    """How long and how `train.fit` trains a job, from the notebook's parameters; a GAN's logs once an epoch."""
    common = {"resume": parameters["resume"], "numerics": parameters["precision"]}
    if "epochs" in parameters:
        every = job["batches"].per_epoch
        return {"steps": parameters["epochs"] * every, "log_every": every, "checkpoint_every": every, **common}
    return {name: parameters[name] for name in ("steps", "log_every", "checkpoint_every")} | common


def networks(stage: Stage, *names: str) -> list[nn.Module]:
    """Networks of a stage's checkpoint, by their names in it, frozen, on the CPU.

    Raises TrainError: a checkpoint that is corrupt or lacks one.
    """
    nz, ngf, ndf = stage.config["sizes"]
    state = {name: dcgan.Discriminator(ndf) if name == "discriminator" else
             dcgan.Encoder(nz, ndf) if "encoder" in name else dcgan.Generator(nz, ngf) for name in names}
    checkpoint.load_checkpoint(stage.path, state)
    return [dcgan.frozen(module) for module in state.values()]


def digest(*modules: nn.Module) -> str:
    """SHA-256 of weights and buffers: tells which ground truth a stage has learnt from."""
    found = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def chain(stage: Stage) -> list[dict]:
    """For results.json: the runs that a stage comes from, itself last, with what was trained where on what."""
    names = ("experiment", "run", "parameters", "seed", "dataset", "reduced", "git", "made_by", "command")
    return [*stage.record.get("chain", []), {name: stage.record[name] for name in names}]


def origin(run: runs.Run, stage: Stage) -> dict:
    """For the run's results.json: its chain, the parameter that names it, what is reduced in it and in the run, and the
    GAN's images and seed: another ground truth is what a repetition has to differ in.
    """
    before, name = chain(stage), BEFORE[run.experiment].removeprefix("celeba-")
    left_out = tuple(f"{word} " for word in (name, "log_every", "checkpoint_every"))      # how it is looked at
    own = [what for what in runs.reduced(run.experiment, run.parameters) if not what.startswith(left_out)]
    earlier = [f"{one['experiment']}: {what}" for one in before for what in one["reduced"] if ": " not in what]
    return {"chain": before, "started_from": name, "reduced": [*earlier, *own], "seed": before[0]["seed"],
            "dataset": SimpleNamespace(**before[0]["dataset"])}


def table(recorded: list[dict], metrics: list[str], setting: list[str]):
    """A pandas DataFrame with a column for each recorded run; what is reduced in its chain is printed above it."""
    found = runs.table(recorded, metrics, setting)
    for number, size in enumerate(found["size"], 1):
        print(f"run {number}:", *(size.split("; ") if size else ["full size"]), sep="\n  ")
    found["size"] = [f"run {number}, {'reduced' if 'instead of' in size else 'full'}"
                     for number, size in enumerate(found["size"], 1)]
    found[setting[0]] = found[setting[0]].str.rpartition("/")[2]
    return found.T


# ------------------------------------------------------------------------------------------------ the three trainings
def check(parameters: dict) -> None:
    """Raise ValueError, before anything is trained, for values that would fail or mean nothing later."""
    least = {"epochs": 1, "steps": 1, "batch_size": 2, "nz": 1, "ngf": 1, "ndf": 1, "keep_every": 1, "epoch": 0,
             "log_every": 1, "checkpoint_every": 1, "n_images": 2}
    for name in least.keys() & parameters:
        if parameters[name] < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {parameters[name]}")
    for name in {"lr", "sigma"} & parameters.keys():
        if parameters[name] <= 0:
            raise ValueError(f"{name} must be positive, got {parameters[name]}")


def gan(parameters: dict, faces: Dataset, where: torch.device, folder: Path | None = None) -> dict:
    """The arguments of `train.fit` for the GAN, from the notebook's parameters; log once an epoch.

    The training images go to the device. Raises ValueError: sizes < 1, lr not positive.
    """
    weights = generator(parameters["seed"], use="weights")
    net = dcgan.initialise(dcgan.Generator(parameters["nz"], parameters["ngf"]), weights).to(where)
    discriminator = dcgan.initialise(dcgan.Discriminator(parameters["ndf"]), weights).to(where)
    step, state = dcgan.gan_step(net, discriminator, generator(parameters["seed"], where), parameters["lr"])
    batches = Shuffled(faces.train.to(where), parameters["batch_size"], parameters["seed"])
    config = _config("celeba-gan", parameters) | {"sizes": [parameters[name] for name in ("nz", "ngf", "ndf")]}
    look = _gan_look(state, config, folder, _album(folder, "GAN", parameters), parameters["keep_every"],
                     batches.per_epoch)
    return {"step": step, "batches": batches, "state": state, "folder": folder, "title": "GAN", "config": config,
            "look": look}


def _gan_look(state: dict, config: dict, folder: Path | None, album: Album, keep_every: int, per_epoch: int):
    """Pictures of fixed codes, and every so many epochs the weights, in <folder>/epochs/<epoch>.

    spread: root mean square deviation of the pictures from their mean, pixels in [-1, 1]; 0 if the GAN has collapsed.
    """
    noise = generator(config["seed"], state["noise"].device, "look")
    z = torch.randn(PICTURES, config["nz"], generator=noise, device=noise.device)
    kept = {name: state[name] for name in ("generator", "discriminator")}

    def look() -> dict[str, Tensor]:
        steps = int(state["clock"].steps)
        images = dcgan.generate(state["generator"], z)
        album.add(steps, images.unflatten(0, (2, -1)))
        epoch, rest = divmod(steps, per_epoch)
        if folder and not rest and epoch % keep_every == 0:
            meta = {"step": steps, "config": config, "history": {}}
            checkpoint.save_checkpoint(folder / f"epochs/{epoch:03}", kept, meta, best=False)
        return {"spread": (images - images.mean(0)).square().mean().sqrt()}

    return look


def encoder(parameters: dict, stage: Stage, where: torch.device, folder: Path | None = None) -> dict:
    """The arguments of `train.fit` for the encoder, from the notebook's parameters and a run of celeba-gan.

    Raises ValueError: lr not positive, an unknown last_layer; TrainError: see `networks`.
    """
    truth, discriminator = (net.to(where) for net in networks(stage, "generator", "discriminator"))
    sizes = stage.config["sizes"]
    net = dcgan.initialise(dcgan.Encoder(sizes[0], sizes[2]), generator(parameters["seed"], use="weights"),
                           parameters["last_layer"]).to(where)
    noise = generator(parameters["seed"], where)
    step, state = dcgan.encoder_step(truth, net, noise, parameters["lr"], parameters["sigma"])
    return {"step": step, "batches": rows(parameters["batch_size"], where), "folder": folder, "title": "encoder",
            "state": state | {"discriminator": discriminator},
            "look": _encoder_look(state, parameters, _album(folder, "encoder", parameters)),
            "config": _config("celeba-encoder", parameters) | {"sizes": sizes, "truth": digest(truth)}}


def joint(parameters: dict, stage: Stage, where: torch.device, folder: Path | None = None) -> dict:
    """The arguments of `train.fit` for encoder and decoder together, from a run of celeba-encoder.

    Raises ValueError: lr not positive; TrainError: see `networks`.
    """
    truth, discriminator, first = (net.to(where) for net in networks(stage, "truth", "discriminator", "encoder"))
    own, sigma, noise = copy.deepcopy(first), stage.config["sigma"], generator(parameters["seed"], where)
    step, state = dcgan.joint_step(truth, own, copy.deepcopy(truth), noise, parameters["lr"], sigma)
    shared = {"sizes": stage.config["sizes"], "sigma": sigma, "truth": digest(truth, first)}
    return {"step": step, "batches": rows(parameters["batch_size"], where), "folder": folder, "title": "joint",
            "state": state | {"discriminator": discriminator, "first_encoder": first},
            "look": _joint_look(state, parameters, sigma, _album(folder, "joint", parameters)),
            "config": _config("celeba-joint", parameters) | shared}


def _encoder_look(state: dict, parameters: dict, album: Album):
    """val_loss: -log q(z|x) of fixed pairs, the networks in evaluation mode; pictures of them and reconstructions."""
    truth, net, sigma = state["truth"], state["encoder"], parameters["sigma"]
    noise = generator(parameters["seed"], state["noise"].device, "look")
    with precision("fp32", noise.device):
        z, x = dcgan.draw(truth, LOOKED_AT, noise, sigma)

    @torch.no_grad()
    def look() -> dict[str, Tensor]:
        with dcgan.normalised("running", net), precision("fp32", x.device):
            mean, log_sigma = net(x)
        pair = torch.stack([dcgan.generate(truth, mean[:PICTURES // 2]), x[:PICTURES // 2]])
        album.add(int(state["clock"].steps), pair)
        return {"val_loss": -diagonal_log_prob(z, mean, 2 * log_sigma).mean()}

    return look


def _joint_look(state: dict, parameters: dict, sigma: float, album: Album):
    """val_elbo: of fixed images and draws of z, the networks in evaluation mode; pictures of reconstructions.

    drift: root mean square difference of the decoder's and the truth's images at the same z ~ N(0, I), in [-1, 1].
    """
    encoder, decoder, truth = state["encoder"], state["decoder"], state["truth"]
    device, seed = state["noise"].device, parameters["seed"]
    noise = generator(seed, device, "look")
    with precision("fp32", device):
        z, x = dcgan.draw(truth, LOOKED_AT, noise, sigma)
        original = truth(z)

    @torch.no_grad()
    def look() -> dict[str, Tensor]:
        with dcgan.normalised("running", encoder, decoder), precision("fp32", device):
            decoded, rec, kl, _, _ = dcgan.elbo_terms(encoder, decoder, x, generator(seed, device, "look codes"), sigma)
            drawn = decoder(z)
        album.add(int(state["clock"].steps), torch.stack([decoded[:PICTURES // 2], x[:PICTURES // 2]]))
        return {"val_elbo": (rec - kl).mean(), "drift": (drawn - original).square().mean().sqrt()}

    return look


def rows(n: int, device: torch.device) -> Whole:
    """Batches of stages that draw their own images: as many rows as to draw."""
    return Whole(torch.empty(n, 0, device=device))


def _album(folder: Path | None, name: str, parameters: dict) -> Album:
    """The run's album, empty if the training starts afresh."""
    album = Album(folder, name)
    if checkpoint.find(parameters.get("resume", ""), folder) is None:
        album.clear()
    return album


def _config(experiment: str, parameters: dict) -> dict:
    return {name: parameters[name] for name in LEARNT_FROM[experiment]}
