"""Interrupts a training run at random, again and again, and compares its end with an unbroken run.

    python tests/benchmarks/soak.py --minutes 60

The command line trains a small model twice. The second run receives SIGKILL, SIGTERM or SIGINT at
a random time after each start, sent to its whole group as a terminal or a scheduler does it, and
is started again with --resume. In the end weights, averaged weights, optimizer and metrics must be
the same, bit for bit (on the CPU).
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from hvae.checkpoint import read_tensors  # noqa: E402

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
OPTIONS = "--size 16 48 --images 4000 --batch-size 8 --device cpu --resume".split()  # noqa: SIM905


def start(out: Path, steps: int, eval_every: int) -> subprocess.Popen:
    """A training process that begins a run of so many steps, or goes on with it."""
    schedule = ["--steps", str(steps), "--eval-every", str(eval_every), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "trainer.py", *OPTIONS, *schedule],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # shells turn SIGINT off in what runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(out: Path, steps: int, eval_every: int, longest: float | None = None) -> Counter:
    """Runs to the end; returns how often which signal ended the process on the way.

    `longest` limits the seconds from a start to a signal; None sends none.
    """
    sent = Counter()
    while True:
        process = start(out, steps, eval_every)
        try:
            _, errors = process.communicate(timeout=longest and random.uniform(1, longest))
        except subprocess.TimeoutExpired:
            number = random.choice(SIGNALS)
            send(process, number)
            sent[number.name] += 1
            continue
        if process.returncode:
            sys.exit(f"the run ended with status {process.returncode}:\n{errors[-2000:]}")
        return sent


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to the process and its workers, and waits for their end."""
    os.killpg(process.pid, number)
    try:
        process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f"the run went on for two minutes after {number.name}")


def choose_schedule(folder: Path, minutes: float) -> tuple[int, int]:
    """(steps, eval_every): a run of about these minutes, a checkpoint every 15 seconds."""
    seconds = []
    for steps in (60, 260):
        begin = time.time()
        run(folder / f"probe{steps}", steps, steps)
        seconds.append(time.time() - begin)
    per_step = max(0.001, (seconds[1] - seconds[0]) / 200)
    steps, eval_every = max(200, int(60 * minutes / per_step)), max(20, int(15 / per_step))
    print(f"{steps} steps of {1000 * per_step:.0f} ms, a checkpoint every {eval_every}", flush=True)
    return steps, eval_every


def differences(one: Path, other: Path) -> list[str]:
    """Names of all that is not the same, bit for bit, in two folders' runs; times aside."""
    (tensors, state), (others, other_state) = (read_tensors(p / "state.pt") for p in (one, other))
    different = sorted(tensors.keys() ^ others.keys())
    different += [
        n for n in tensors.keys() & others.keys() if not torch.equal(tensors[n], others[n])
    ]
    different += [n for n in ("step", "clip", "optimizers") if state[n] != other_state[n]]
    rows = [list(csv.DictReader((out / "metrics.csv").open())) for out in (one, other)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    return different + ["metrics.csv"] * (rows[0] != rows[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="about how long the unbroken run takes")
    add("--longest", type=float, default=60, help="limit of the seconds from a start to the signal")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        schedule = choose_schedule(Path(folder), args.minutes)
        unbroken, interrupted = Path(folder) / "unbroken", Path(folder) / "interrupted"
        run(unbroken, *schedule)
        print("the unbroken run is done", flush=True)
        sent = run(interrupted, *schedule, args.longest)
        different = differences(unbroken, interrupted)
        print(f"signals: {dict(sent)}; different in the end: {different or 'nothing'}")
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
