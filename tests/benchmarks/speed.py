"""Images per second, side by side: rendering, sampling and training on this machine.

    python tests/benchmarks/speed.py

Beside training stands the arithmetic of the model's layers, forward and backward, in TFLOP/s, and on a GPU of PEAK its
share of what the tensor cores could do: the model FLOPs utilisation (Chowdhery et al. 2022, appendix B).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import CaptchaDataset  # noqa: E402
from model import HVAE, has_bf16, keep_memory, pick_device  # noqa: E402
from trainer import loss_terms  # noqa: E402

PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}  # bfloat16 TFLOP/s without sparsity, from the data sheets
CHAIN_OUTER = [("conv-bn", 32), ("pool", 2), ("conv-bn", 64), ("pool", 2), ("conv-bn", 64)]
CHAIN_INNER = [[("conv-bn", 32), ("skip-up", 0), ("pool", 2), ("conv-bn", 64), ("skip-up", 1), ("pool", 2),
                ("conv-bn", 64), ("conv-bn", 64), ("upsample", 2), ("skip-down", 1), ("conv-bn", 32),
                ("upsample", 2), ("skip-down", 0), ("conv-bn", 1)]]


def rate(images: int, work: Callable[[], None], seconds: float = 8.0) -> float:
    """Images per second of repeated work(), after one call that is not counted."""
    work()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return done / (time.perf_counter() - start)


def training_step(model: HVAE, device: torch.device, batch_size: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = CaptchaDataset(batch_size, image_size=model.input_shape[1:])
    x = torch.stack([data[i][0] for i in range(batch_size)]).to(device, memory_format=torch.channels_last)
    y = None if model.text_length is None else torch.stack([data[i][1] for i in range(batch_size)]).to(device)
    closed = torch.zeros(batch_size, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            loss, _ = loss_terms(model, x, y, 1.0, 0.0, closed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # loss_terms' .item() waits for the device

    return step


def flops(step: Callable[[], None]) -> int:
    """Floating-point operations of one training step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def throughput(per_second: float, device: torch.device) -> str:
    """TFLOP/s, and the share of the device's peak if that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
    return f"{per_second / 1e12:6.2f} TFLOP/s" + (f", {per_second / 1e12 / peak:.1%} of the peak" if peak else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, ...; CUDA if there is one")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    device, batch = pick_device(args.device), args.batch_size
    torch.set_flush_denormal(True)
    keep_memory()
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batches of {batch}")
    renders = CaptchaDataset(1_000_000)
    print(f"rendering, one process              {rate(batch, lambda: [renders[i] for i in range(batch)]):8.0f} images/s")
    models = {"HVAE()": HVAE(),
              "a chain of two levels": HVAE(CHAIN_OUTER, CHAIN_INNER, latent_channels=1, inference="bottom-up", text_length=None)}
    for name, model in models.items():
        model.to(device)
        sampling = rate(batch, lambda: model.eval().sample(batch).cpu())
        print(f"sampling, {name:24s}  {sampling:8.0f} images/s")
        step = training_step(model.train(), device, batch)
        training, work = rate(batch, step), flops(step) / batch
        print(f"training, {name:24s}  {training:8.0f} images/s {throughput(training * work, device)}")


if __name__ == "__main__":
    main()
