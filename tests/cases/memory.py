"""Products in a process of their own: what was planned, and what they took at their peak, as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import linearise
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.plan import plan
from isoflat.risk.routes.reverse import Recomputed

NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)),
    "lenet": lambda: nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 100), nn.GELU(), nn.Linear(100, 10),
    ),
    "encoder": lambda: nn.Sequential(
        nn.Unflatten(1, (28, 28)), nn.Linear(28, 64),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), 2), nn.Flatten(),
        nn.Linear(64 * 28, 10),
    ),
}  # fmt: skip


def main(name: str, rows: int, memory: int) -> None:
    """Print the plan's forecast, and the growth of the process's high-water mark."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x, y = torch.randn(rows, *((1, 28, 28) if name == "lenet" else (784,))), torch.randint(10, (rows,))
    state = Network(net).state()

    def risk(count, batch):
        return EmpiricalRisk(
            Network(net), as_loss(nn.CrossEntropyLoss()), as_batches((x[:count], y[:count]), rows=batch)
        )

    vector = torch.randn(state.space.size, 1)
    with exactly(state.device):
        Recomputed(risk(8, 8), state).products(vector)  # what torch sets up once is not what is asked about
        planned = plan(risk(rows, rows // 4), state, Recomputed, rows, memory)
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks, those of the parent among them
        before = _kilobytes("VmRSS")
        made = linearise(risk(rows, rows // 4), state, planned)
        for _ in range(2):
            made.products(vector)
    peak = 1024 * (_kilobytes("VmHWM") - before)
    print(json.dumps({"kept": planned.kept, "rows": planned.rows, "forecast": planned.forecast, "peak": peak}))


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
