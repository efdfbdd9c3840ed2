"""Not a test: train small models, be killed by SIGKILL at random steps and while writing, resume each time, finish.

usage: killed_training.py KIND FOLDER SEED; prints the kill points. Children are forked, so torch is imported once.
`run_killed` runs it; `assert_equal` compares what it leaves with what an uninterrupted run does.
"""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lib import autoencoders, binarised, data, documents, hvae, semhash, symmetric, train, vamplikelihood

STEPS, KILLS = 100, 6
EVERY = {"log_every": 4, "checkpoint_every": 6}
KINDS = {"vae": ["vae"], "aae": ["aae"], "symmetric": ["symmetric"], "semhash": ["semhash"], "vamp": ["vamp"],
         "replicas": ["vae", "vae"]}                                       # what is trained, together
HASHING = {"dataset": "topics", "encoder": "e2", "input": "", "bits": 4, "decoder_depth": 2, "hidden": 6,
           "estimator": "disarm", "kl": "sampled", "epochs": 5, "finetune_epochs": 20, "finetune_estimates": 2,
           "batch_size": 410, "lr": 1e-3, "precision": "tf32"}             # STEPS in both stages, 4 an epoch

VAMP = {"model": "hvae", "prior": "vamp", "dataset": "digits", "binarisation": "dynamic", "components": 4,
        "pseudo_init": "noise", "hidden": 6, "latent_dim": 3, "warmup": 3, "patience": STEPS, "batch_size": 40,
        "lr": 1e-3, "normalised": True, "precision": "tf32"}               # 29 steps an epoch, so that the warm-up ends


def replica(kind: str, seed: int, folder: Path) -> dict:
    """The arguments of `train.fit` for one small model."""
    if kind == "vamp":                                     # bits drawn in every step, looks with noise, a rule to stop
        images = binarised.load("digits", "dynamic")
        return vamplikelihood.replica(VAMP | {"seed": seed}, images, torch.device("cpu"), folder)
    if kind == "symmetric":                                # two players, two optimizers, running statistics, a chain
        model = hvae.initialise(hvae.build("digits", "ladder", (5, 9), 2, 20), train.generator(seed))
        step, state = symmetric.training(model, train.generator(seed + 1), "symmetric", 1e-3)
    else:
        model = autoencoders.Autoencoder(kind, (1, 32), dim=4).initialise(train.generator(seed))
        step, state = autoencoders.training(model, train.generator(seed + 1), learn_sigma=kind == "vae")
    images = data.load("digits", size=28 if kind == "symmetric" else 32).train
    batches = train.Shuffled(images, 16, seed + 2)
    return {"step": step, "batches": batches, "state": state, "config": {"kind": kind, "seed": seed}, "folder": folder}


def hashing(seed: int, folder: Path) -> dict:
    """What `semhash.learn` trains."""
    corpora = semhash.corpora(documents.load("topics"), torch.device("cpu"))
    return semhash.replica(HASHING | {"seed": seed}, *corpora, torch.device("cpu"), folder)


def fit(kind: str, folder: Path, resume: str = "", die_at: int | None = None, die_at_write: int | None = None,
        stop: int = STEPS) -> list[dict]:
    """Train `stop` steps, dying on the way if told so; returns the histories. Model i's folder is folder/i."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done, writes, fsync = [0], [0], os.fsync

    def counted(step):
        def call(batch):
            if done[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            return step(batch)
        return call

    def counted_fsync(file):
        writes[0] += 1
        if writes[0] == die_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    def together(jobs, **options):
        return train.fit_together([job | {"step": counted(job["step"])} for job in jobs], **options | EVERY)

    os.fsync = counted_fsync
    try:
        if kind == "semhash":                              # its two stages are trained by its own `learn`
            semhash.fit_together = together
            return semhash.learn([hashing(3, folder / "0")], resume)
        replicas = [replica(each, 3 + 10 * i, folder / str(i)) for i, each in enumerate(KINDS[kind])]
        return together(replicas, steps=stop, resume=resume)
    finally:
        os.fsync, semhash.fit_together = fsync, train.fit_together
        torch.set_num_threads(threads)


def main() -> None:
    """Kill KILLS times at random (every third time in the middle of writing a checkpoint), then run to the end."""
    kind, folder, rng = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    models = len(KINDS[kind])
    for i in range(KILLS + 1):
        last = i == KILLS
        early = 1 if i else 7 * models                    # the first process gets beyond a checkpoint
        where = {} if last else {"die_at_write": rng.randint(1, 4 * models)} if i % 3 == 2 else {
            "die_at": rng.randint(early, 14 * models)}
        child = os.fork()
        if child == 0:
            fit(kind, folder, "auto", **where)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(where, "->", "killed" if os.WIFSIGNALED(status) else f"exit {status}", flush=True)
        if last:
            sys.exit(status)


def run_killed(kind: str, folder: Path) -> str:
    """Run `main` in a process of its own; returns what is to be told if a comparison fails."""
    seed = random.SystemRandom().randrange(10 ** 6)
    child = subprocess.run([sys.executable, __file__, kind, str(folder), str(seed)], capture_output=True, text=True,
                           timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = f"seed {seed}\n{child.stdout}{child.stderr}"
    assert child.returncode == 0, told
    assert child.stdout.count("killed") >= KILLS - 1, told
    return told


def meta(folder: Path, name: str = "latest") -> dict:
    """What a folder's checkpoint says of itself."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


def assert_equal(killed: Path, whole: Path, told: str = "") -> None:
    """Both checkpoints of two folders hold the same, to the bit."""
    for name in ("latest", "best"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (killed, whole))
        assert a.keys() == b.keys() and len(b) > 40
        different = [key for key in b if not torch.equal(a[key], b[key])]
        assert not different, f"{different}\n{told}"
        for key in ("step", "history", "window", "best"):
            assert meta(killed, name)[key] == meta(whole, name)[key], f"{key}\n{told}"


if __name__ == "__main__":
    main()
