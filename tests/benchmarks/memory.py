"""Peak memory and time of training and sampling, by batch, image size and number of levels.

    python tests/benchmarks/memory.py

Every line is measured in a process of its own. On the CPU the peak is that of the whole process,
libraries included.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed import rate, step_of

from hvae.parallel import keep_memory, pick_device
from model import HVAE, INNER_CONFIG, count_parameters

CASES = [
    *[dict(batch=n) for n in (1, 8, 32, 128)],
    *[dict(size=size, batch=8) for size in ((32, 80), (64, 160), (128, 320), (256, 640))],
    *[dict(levels=n) for n in (3, 5, 7, 9)],
]


def measure(
    work: str,
    size: tuple[int, int],
    batch: int,
    levels: int,
    device: torch.device,
    seconds: float,
) -> tuple[float, float, int]:
    """(megabytes at the peak, images/s, parameters) of work, "training" or "sampling".

    HVAE() gets as many 8x20 levels as it takes; the 4x10 map and the vector stay on top.
    """
    inner = [INNER_CONFIG[0]] * (levels - 3) + INNER_CONFIG[2:]
    model = HVAE(input_size=size, inner_config=inner).to(device).eval()
    sample = lambda: model.sample(batch).cpu()
    step = step_of(model, device, batch) if work == "training" else sample
    keep_memory()
    per_second = rate(batch, step, seconds)
    return peak(device), per_second, count_parameters(model)


def peak(device: torch.device) -> float:
    """Megabytes, of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(work: Callable, *arguments):
    """What work(...) returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, ...; CUDA if there is one")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    args = parser.parse_args()
    device = pick_device(args.device)
    code = f"a process with nothing but the code: {peak(device):.0f} MB"
    print(f"device {device}, {torch.get_num_threads()} threads; {code}")
    print("  size     levels  batch  parameters   training                sampling")
    for case in CASES:
        (h, w), batch, levels = ({"size": (60, 160), "batch": 32, "levels": 5} | case).values()
        what = ((h, w), batch, levels, device, args.seconds)
        trained, training_rate, parameters = alone(measure, "training", *what)
        sampled, sampling_rate, _ = alone(measure, "sampling", *what)
        print(
            f"  {h:3d}x{w:<3d}  {levels:6d}  {batch:5d}  {parameters:10,d}"
            f"  {trained:6.0f} MB {1000 / training_rate:7.1f} ms/image"
            f"  {sampled:6.0f} MB {1000 / sampling_rate:6.1f} ms/image",
            flush=True,
        )


if __name__ == "__main__":
    main()
