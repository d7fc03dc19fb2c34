"""A training program that the benchmark of recovery kills; writes when it came how far. Argument: a folder."""

import os
import sys
import time
from pathlib import Path

BEGUN = time.time()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from conjugo.distributed import Checkpointer, init, shutdown  # noqa: E402
from conjugo.optim import NLCG  # noqa: E402

IMPORTED = time.time()
folder, steps = Path(sys.argv[1]), 60
env = init(timeout=30)
joined = time.time()
model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
optimizer = NLCG(model.parameters(), lr=1e-3, precond="bfgs")
wrapped = nn.parallel.DistributedDataParallel(model)
checkpoints = Checkpointer(folder / "checkpoints", keep=1)
start = checkpoints.load_latest(model=model, optimizer=optimizer) or 0
loaded = time.time()
for step in range(start, steps):
    optimizer.zero_grad()
    wrapped(torch.ones(8, 512)).square().mean().backward()
    optimizer.step()
    if env.rank == 0 and step == start:
        times = [BEGUN, IMPORTED, joined, loaded, time.time()]
        (folder / f"attempt-{env.restart_count}").write_text(" ".join(map(str, times)))
    time.sleep(0.05)
    if step % 10 == 9:
        checkpoints.save(step + 1, model=model, optimizer=optimizer)
    (folder / f"pid-{env.rank}").write_text(f"{os.getpid()} {step}")
shutdown()
