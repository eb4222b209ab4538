"""Images per second, side by side: rendering, sampling and training on this machine.

    python tests/benchmarks/speed.py

Beside training stands the arithmetic of the model's layers, forward and backward, in TFLOP/s. On
a GPU of PEAK follows its share of what the tensor cores could do: the model FLOPs utilisation
(Chowdhery et al. 2022, appendix B).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import CaptchaDataset
from generate import BATCH, MAX_PROCESSES, SampleBatches
from hvae.parallel import has_bf16, keep_memory, pick_device
from hvae.run import Run
from model import HVAE
from trainer import Hyperparameters, training_step

# bfloat16 TFLOP/s without sparsity, from the data sheets
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}


def rate(images: int, work: Callable[[], None], seconds: float = 8.0) -> float:
    """Images per second of repeated work(), after one call that is not counted."""
    work()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return done / (time.perf_counter() - start)


def step_of(model: HVAE, device: torch.device, batch_size: int) -> Callable[[], None]:
    """A training step in the middle of a run, on the same images each time."""
    hp = Hyperparameters(batch_size=batch_size)
    hp.fit_to(model)
    run = Run(model, hp, device, has_bf16(device), description="", images=batch_size)
    run.step = hp.steps // 2
    data = CaptchaDataset(batch_size, image_size=model.input_shape[1:])
    x, y = (torch.stack(column) for column in zip(*data, strict=True))
    return lambda: training_step(run, x, y)  # its .tolist() waits for the device


def flops(step: Callable[[], None]) -> int:
    """Floating-point operations of one training step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def throughput(per_second: float, device: torch.device) -> str:
    """TFLOP/s, and the share of the device's peak if that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
    share = f", {per_second / 1e12 / peak:.1%} of the peak" if peak else ""
    return f"{per_second / 1e12:6.2f} TFLOP/s{share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, ...; CUDA if there is one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    args = parser.parse_args()
    device, batch = pick_device(args.device), args.batch_size
    torch.set_flush_denormal(True)
    keep_memory()
    versions = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"device {device}, {versions}, batches of {batch}")
    data = CaptchaDataset(1_000_000)
    rendering = rate(batch, lambda: [data[i] for i in range(batch)], args.seconds)
    print(f"rendering, one process              {rendering:8.0f} images/s")
    model = HVAE().to(device)
    sampling = rate(batch, lambda: model.eval().sample(batch).cpu(), args.seconds)
    print(f"sampling, HVAE()                    {sampling:8.0f} images/s")
    if device.type == "cpu":
        a_set = SampleBatches(model, 8 * BATCH * min(torch.get_num_threads(), MAX_PROCESSES))
        sampling = rate(a_set.n, lambda: list(a_set.by_all_cores()), args.seconds)
        print(f"· a set, by a process on each core  {sampling:8.0f} images/s")
    step = step_of(model, device, batch)
    training, work = rate(batch, step, args.seconds), flops(step) / batch
    speed = throughput(training * work, device)
    print(f"training, HVAE()                    {training:8.0f} images/s {speed}")


if __name__ == "__main__":
    main()
