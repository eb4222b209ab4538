"""Kills a training run at random instants, again and again, and compares its end with that of a run left alone.

    python tests/benchmarks/soak.py --minutes 60

The command line trains a small model twice. The second run is struck by SIGKILL, SIGTERM or SIGINT, sent to its whole group
as a terminal or a scheduler does it, at a random time after each start, and started again with --resume. In the end
weights, averaged weights, optimiser and metrics must be the same, bit for bit (on the CPU).
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from runs import read_csv, read_state  # noqa: E402

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def start(out: Path, steps: int, evaluate: int) -> subprocess.Popen:
    command = [sys.executable, "trainer.py", "--size", "16", "48", "--images", "4000", "--batch-size", "8", "--device", "cpu",
               "--steps", str(steps), "--eval-every", str(evaluate), "--out", str(out), "--resume"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells turn off in what runs in the background
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=heed)


def struck(out: Path, steps: int, evaluate: int, longest: float) -> dict[str, int]:
    """Runs to the end, struck on the way; how often by which signal."""
    strikes = {number.name: 0 for number in SIGNALS}
    while True:
        process = start(out, steps, evaluate)
        try:
            _, errors = process.communicate(timeout=random.uniform(1, longest))
        except subprocess.TimeoutExpired:
            number = random.choice(SIGNALS)
            os.killpg(process.pid, number)
            try:
                process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                sys.exit(f"the run went on for two minutes after {number.name}")
            strikes[number.name] += 1
            continue
        if process.returncode:
            sys.exit(f"the run ended with status {process.returncode}:\n{errors[-2000:]}")
        return strikes


def same(a, b) -> bool:
    """Whether two nested structures of tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="about how long the run that is left alone should take")
    parser.add_argument("--longest", type=float, default=60, help="most seconds between a start and the strike")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, other = Path(folder) / "alone", Path(folder) / "struck"
        probe = time.time()
        start(Path(folder) / "probe", 60, 60).communicate()
        first = time.time() - probe
        start(Path(folder) / "probe2", 260, 260).communicate()
        per_step = max(0.001, (time.time() - probe - 2 * first) / 200)
        steps = max(200, int(60 * args.minutes / per_step))
        evaluate = max(20, int(15 / per_step))
        print(f"{steps} steps of {1000 * per_step:.0f} ms, a checkpoint every {evaluate}", flush=True)
        start(alone, steps, evaluate).communicate()
        print("left alone: done", flush=True)
        strikes = struck(other, steps, evaluate, args.longest)
        states = [read_state(out / "state.pt") for out in (alone, other)]
        names = ("model", "average", "optimizer", "step", "clip")
        verdict = {name: same(states[0][name], states[1][name]) for name in names}
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(out / "metrics.csv")] for out in (alone, other)]
        verdict["metrics.csv"] = rows[0] == rows[1]
        print(f"strikes: {strikes}; the same in the end: {verdict}")
        sys.exit(0 if all(verdict.values()) else 1)


if __name__ == "__main__":
    main()
