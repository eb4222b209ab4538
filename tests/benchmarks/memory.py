"""Peak memory and time of training and sampling, as the batch, the image and the number of levels grow.

    python tests/benchmarks/memory.py

Every line is measured in a process of its own; on the CPU the peak is that of the whole process, libraries included.
"""

import argparse
import copy
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from model import INNER_CONFIG, LATENT_CHANNELS, HVAE, keep_memory, pick_device  # noqa: E402
from speed import rate, training_step  # noqa: E402

SAME_SIZE = [("res", 128)]


def with_levels(levels: int) -> dict:
    """HVAE()'s arguments with fewer 8x20 levels, or more; the 4x10 map and the vector stay on top."""
    extra = levels - len(LATENT_CHANNELS)
    return dict(inner_config=[SAME_SIZE] * (2 + extra) + INNER_CONFIG[2:],
                latent_channels=(4,) * (3 + extra) + LATENT_CHANNELS[3:])


CASES = [dict(batch=b) for b in (1, 8, 32, 128)] \
    + [dict(size=size, batch=8) for size in ((32, 80), (64, 160), (128, 320), (256, 640))] \
    + [dict(levels=n) for n in (3, 5, 7, 9)]


def peak(device: torch.device) -> float:
    """Megabytes, of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(size: tuple[int, int], levels: int, device: torch.device) -> HVAE:
    return HVAE(input_size=size, **with_levels(levels)).to(device)


def training(size: tuple[int, int], batch: int, levels: int, device: torch.device, seconds: float) -> tuple[float, float, int]:
    """(peak, images/s, parameters) of training, the averaged weights and the optimiser's included."""
    model = build(size, levels, device)
    average = copy.deepcopy(model)  # noqa: F841, held as in a run
    step = training_step(model.train(), device, batch)
    return peak_and_rate(step, batch, device, seconds) + (sum(p.numel() for p in model.parameters()),)


def sampling(size: tuple[int, int], batch: int, levels: int, device: torch.device, seconds: float) -> tuple[float, float]:
    model = build(size, levels, device).eval()
    return peak_and_rate(lambda: model.sample(batch).cpu(), batch, device, seconds)


def peak_and_rate(work, batch: int, device: torch.device, seconds: float) -> tuple[float, float]:
    keep_memory()
    per_second = rate(batch, work, seconds)
    return peak(device), per_second


def alone(work, *arguments):
    """What work(...) returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, ...; CUDA if there is one")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(f"device {device}, {torch.get_num_threads()} threads; a process with nothing but the code: {peak(device):.0f} MB")
    print("  size     levels  batch  parameters   training                sampling")
    for case in CASES:
        size, batch, levels = (case.get(k, v) for k, v in (("size", (60, 160)), ("batch", 32), ("levels", 5)))
        trained, per_second, parameters = alone(training, size, batch, levels, device, args.seconds)
        sampled, samples = alone(sampling, size, batch, levels, device, args.seconds)
        print(f"  {size[0]:3d}x{size[1]:<3d}  {levels:6d}  {batch:5d}  {parameters:10,d}  {trained:6.0f} MB {1000 / per_second:7.1f} ms/image"
              f"  {sampled:6.0f} MB {1000 / samples:6.1f} ms/image", flush=True)


if __name__ == "__main__":
    main()
