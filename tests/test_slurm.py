"""The rehearsal on a real Slurm of one node, on loopback: a job is killed, the node dies, the head is killed.

`pytest -m slurm -s tests/test_slurm.py` prints what happened when. Needs root and Debian's packages slurmctld, slurmd,
slurm-client, munge and slurm-wlm-basic-plugins; takes about five minutes on two cores.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from fresh_clone import ended, environment, fresh_clone, skip_without_snakemake

from lib import checkpoint

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).with_name("slurm.sh")
COMPLETED = re.compile(r"^runs/\S+: .* \([\d.]+ s\)$", re.M)      # what `run` says when it has made a result
FOUND = re.compile(r"^runs/\S+ is complete \(", re.M)             # when there was one


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node in a folder, which is returned."""
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(program):
            pytest.skip(f"there is no {program}: apt-get install slurmctld slurmd slurm-client munge "
                        "slurm-wlm-basic-plugins")
    if os.geteuid():
        pytest.skip("only root can start a Slurm")
    if os.path.exists("/etc/slurm/slurm.conf"):                # not so the dangling link of a killed test
        pytest.skip("this machine has a Slurm (/etc/slurm/slurm.conf); what a killed test left is ended by "
                    "`tests/slurm.sh stop FOLDER`, the folder that this links to")
    skip_without_snakemake()
    folder = tmp_path / "slurm"
    try:
        subprocess.run([SCRIPT, "start", folder], check=True)
        yield folder
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def sweep(slurm, tmp_path, monkeypatch):
    """A rehearsal, whose heads end with the test."""
    monkeypatch.setenv("SLURM_CONF", str(slurm / "slurm.conf"))
    found = Rehearsal(tmp_path)
    yield found
    for head in found.heads:
        head.kill()
        head.wait()


class Rehearsal:
    """The sweep in a fresh clone, its head a process of its own, and a transcript."""

    def __init__(self, tmp_path: Path):
        self.book = fresh_clone(tmp_path / "book")
        self.began, self.heads = time.monotonic(), []
        self.profile = tmp_path / "profile"                   # the book's own, but for a node of two cores
        settings = yaml.safe_load((self.book / "workflow" / "profiles" / "slurm" / "config.yaml").read_text())
        settings |= {"default-resources": ["gpu=1", "mem_mb=1500", "runtime=30"], "set-threads": ["run=1"],
                     "slurm-init-seconds-before-status-checks": 2}
        self.profile.mkdir()
        (self.profile / "config.yaml").write_text(yaml.safe_dump(settings))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def head(self) -> subprocess.Popen:
        words = [sys.executable, "-m", "lib", "sweep", "rehearsal", "--preset", "smoke", "--profile", str(self.profile)]
        self.output = self.book / "runs" / f"head-{len(self.heads)}.log"
        self.output.parent.mkdir(exist_ok=True)
        with open(self.output, "w") as file:
            self.heads.append(subprocess.Popen(words, cwd=self.book, env=environment(self.book), stdout=file,
                                               stderr=subprocess.STDOUT))
        return self.heads[-1]

    def results(self) -> list[Path]:
        return sorted(self.book.glob("runs/*/*/results.json"))

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.book.glob("runs/*/*/sweep.log")))

    def running(self) -> list[psutil.Process]:
        """The kernels of this rehearsal that run in jobs now."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                if "ipykernel_launcher" in (process.info["cmdline"] or []):
                    own = process.environ()
                    if own.get("PYTHONPATH") == str(self.book) and "SLURM_JOB_ID" in own:
                        found.append(process)
            except psutil.Error:
                pass
        return found

    def under_way(self, experiment: str) -> dict[str, int]:
        """{job: step of its checkpoint} of the runs of a notebook that have one and go on."""
        found = {}
        for kernel in self.running():
            with contextlib.suppress(psutil.Error):
                folder = Path(kernel.environ()["VAEBOOK_RUN"])
                if folder.parent.name == experiment and (folder / "latest.safetensors").is_file():
                    found[job_of(kernel)] = checkpoint.read_meta(folder / "latest.safetensors")["step"]
        return found

    def until(self, condition, what: str, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain for {what}: " + self.output.read_text()
            time.sleep(0.2)

    def kill_the_node(self, slurm: Path) -> int:
        """End Slurm's daemon on the node and everything under it, as a crash does; returns how many kernels died."""
        jobs, steps = {kernel.environ()["SLURM_JOB_ID"] for kernel in self.running()}, []
        daemon = psutil.Process(int((slurm / "slurmd.pid").read_text()))
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "slurmstepd":
                steps += [process, *process.children(recursive=True)]
        for process in [daemon, *steps]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        return len(jobs)


def squeue() -> list[list[str]]:
    told = subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in told.splitlines()]


def job_of(kernel: psutil.Process) -> str:
    return kernel.environ()["SLURM_JOB_ID"]


def test_a_sweep_with_a_chain_survives_a_killed_job_a_dead_node_and_a_killed_head(slurm, sweep):
    node = os.uname().nodename.partition(".")[0]
    head = sweep.head()
    sweep.say("the sweep `rehearsal` begins: 12 runs, 4 of them a chain; two cores, two make-believe GPUs")

    sweep.until(lambda: sweep.under_way("celeba-encoder"), "a checkpoint of celeba-encoder")
    (victim, step), = sweep.under_way("celeba-encoder").items()
    subprocess.run(["scancel", victim], check=True)
    sweep.say(f"{len(sweep.results())} of 12 done; job {victim} is cancelled: celeba-encoder, with a checkpoint of "
              f"step {step}")

    sweep.until(lambda: len(sweep.results()) >= 3 and sweep.running(), "three results")
    before, running = len(sweep.results()), [job for job, state in squeue() if state == "RUNNING"]
    died = sweep.kill_the_node(slurm)
    assert died
    sweep.say(f"{before} of 12 done; the node dies while jobs {', '.join(sorted(running))} run on it")
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=rehearsal"], check=True)
    time.sleep(5)
    subprocess.run([SCRIPT, "node-up", slurm], check=True)
    sweep.say(f"the node is back; the queue: {' '.join(sorted(state for _, state in squeue()))}")

    sweep.until(lambda: len(sweep.results()) >= 6 and sweep.running(), "six results")
    children = psutil.Process(head.pid).children(recursive=True)
    before = len(sweep.results())
    head.send_signal(signal.SIGKILL)
    head.wait()
    assert ended(children, 20)
    orphans = squeue()
    states = " ".join(sorted(state for _, state in orphans))
    sweep.say(f"{before} of 12 done; the head is killed (-9), Snakemake with it; left in the queue: {states}")
    assert "RUNNING" in states

    head = sweep.head()
    sweep.say("a new head begins")
    assert head.wait(timeout=1800) == 0, sweep.output.read_text()
    sweep.say("the new head ends")
    for number in range(2):
        said = (sweep.book / "runs" / f"head-{number}.log").read_text()
        print(f"--- head {number + 1} said:\n{said}---")

    results = [json.loads(path.read_text()) for path in sweep.results()]
    sweep.until(lambda: not [1 for _, state in squeue() if state in ("RUNNING", "PENDING", "COMPLETING")],
                "an empty queue")
    made, found = COMPLETED.findall(sweep.logs()), FOUND.findall(sweep.logs())
    attempts = len(re.findall("^--- ", sweep.logs(), re.M))
    sweep.say(f"{len(results)} results; {attempts} attempts: {len(made)} made a result, {len(found)} found one")
    assert len({(one["experiment"], one["run"]) for one in results}) == len(results) == 12
    assert all(one["metrics"] and not one["git"]["dirty"] for one in results)
    assert len(made) == len(set(made)) == 12, sweep.logs()           # none lost, none made twice
    assert attempts >= 12 + 1 + died
    assert len(re.findall("^--- .* job [0-9]+ GPU [01]$", sweep.logs(), re.M)) == attempts   # one each, from Slurm
    assert sweep.head().wait(timeout=600) == 0
    assert "12 of 12 runs are done, 12 of them were before" in sweep.output.read_text()
    sweep.say("a third head finds nothing to do")
    parts = [part["steps"] for one in results if one["experiment"] == "celeba-encoder" for part in one["made_by"]]
    sweep.say(f"steps of the processes that trained celeba-encoder and what it starts from: {parts}")
    assert any(last > first >= step > 0 for first, last in parts)                    # resumed, not begun again
