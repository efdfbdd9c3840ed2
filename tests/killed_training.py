"""Not a test: train a small model, be killed by SIGKILL at random steps and while writing, resume each time, finish.

usage: killed_training.py KIND FOLDER SEED; prints the kill points. Children are forked, so torch is imported once.
"""
import os
import random
import signal
import sys
from pathlib import Path

import torch

from lib import autoencoders, data, train

STEPS, KILLS = 100, 6


def fit(kind: str, folder: Path, resume: str = "", die_at: int | None = None, die_at_write: int | None = None,
        stop: int = STEPS) -> dict:
    """Train `stop` steps, dying on the way if told so; returns the history."""
    torch.set_num_threads(1)
    images = data.load("digits", size=32).train
    model = autoencoders.Autoencoder(kind, (1, 32), dim=4).initialise(train.generator(3))
    step, state = autoencoders.training(model, train.generator(4), learn_sigma=kind == "vae")
    done, writes, fsync = [0], [0], os.fsync

    def counted(batch):
        if done[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return step(batch)

    def counted_fsync(file):
        writes[0] += 1
        if writes[0] == die_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = counted_fsync
    try:
        return train.fit(counted, train.Shuffled(images, 16, seed=5), steps=stop, state=state, config={"kind": kind},
                         folder=folder, log_every=4, checkpoint_every=6, resume=resume)
    finally:
        os.fsync = fsync


def main() -> None:
    """Kill KILLS times at random (every third time in the middle of writing a checkpoint), then run to the end."""
    kind, folder, rng = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    for i in range(KILLS + 1):
        last = i == KILLS
        where = {} if last else {"die_at_write": rng.randint(1, 4)} if i % 3 == 2 else {"die_at": rng.randint(1, 14)}
        child = os.fork()
        if child == 0:
            fit(kind, folder, "latest" if (folder / "latest.safetensors").is_file() else "", **where)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(where, "->", "killed" if os.WIFSIGNALED(status) else f"exit {status}", flush=True)
        if last:
            sys.exit(status)


if __name__ == "__main__":
    main()
