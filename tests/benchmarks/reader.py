"""A captcha reader: the measure of whether samples can be read. Not part of the model.

    python tests/benchmarks/reader.py            trains it (about five minutes on two cores), writes reader.pt
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import CaptchaDataset, make_loader  # noqa: E402
from trainer import has_bf16  # noqa: E402


class Reader(nn.Module):
    """Images (B, 3, 60, 160) in [0, 1] -> the logits of their symbols (B, 4, 36)."""

    def __init__(self, text_length: int = 4, symbols: int = 36):
        super().__init__()
        self.shape = (text_length, symbols)
        conv = lambda c_in, c_out, stride: [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.maps = nn.Sequential(*conv(3, 32, 2), *conv(32, 64, 2), *conv(64, 64, 1), *conv(64, 128, 2), *conv(128, 128, 1))
        self.columns = nn.Conv2d(128, 64, (8, 1))  # (B, 64, 1, 20)
        self.hidden = nn.Linear(64 * 20, 128)
        self.heads = nn.Linear(128, text_length * symbols)

    def features(self, x: Tensor) -> Tensor:
        """(B, 128): what the reader knows of an image before it names the symbols."""
        return F.relu(self.hidden(F.relu(self.columns(self.maps(2 * x - 1))).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.features(x)).unflatten(1, self.shape)


def train_reader(minutes: float = 5.0, batch_size: int = 64, device: str = "cpu", seed: int = 1) -> Reader:
    """Trains a reader on captchas that no model has seen (another seed), for so many minutes."""
    torch.manual_seed(seed)
    reader = Reader().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.01)
    loader = make_loader(CaptchaDataset(1_000_000, seed=seed), batch_size, workers=1, seed=seed)
    start, spent = time.monotonic(), 0.0
    bar = tqdm(loader, desc="reader", unit="step", dynamic_ncols=True, mininterval=1)
    for x, y in bar:
        spent = (time.monotonic() - start) / (60 * minutes)
        if spent >= 1:
            break
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 20 * spent + 0.01) * (1 - spent)
        x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16(torch.device(device))):
            logits = reader(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        correct = (logits.argmax(2) == y).float().mean().item()
        bar.set_postfix_str(f"{spent:.0%} of the time, symbols read {correct:.2f}", refresh=False)
    return reader.eval()


def load_reader(path: Path, minutes: float, device: str) -> Reader:
    """The reader of a file; trains it and writes the file if there is none."""
    if not path.is_file():
        reader = train_reader(minutes, device=device)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(reader.state_dict(), path)
    reader = Reader().to(device)
    reader.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return reader.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the captcha reader.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="checkpoints/run/reader.pt")
    args = parser.parse_args()
    load_reader(Path(args.out), args.minutes, args.device)


if __name__ == "__main__":
    main()
