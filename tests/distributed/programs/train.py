"""A small training program: NLCG under DDP, checkpoints, a log of steps. Arguments: folder, steps, seconds for each step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from conjugo.distributed import Checkpointer, GlobalBatchSampler, PerRank, RandomState, init, micro_batches, shutdown
from conjugo.optim import NLCG

folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
env = init(timeout=20)
stopped = False


def stop(*_):
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
torch.manual_seed(0)
data = torch.randn(120, 6)
labels = torch.randint(3, (120,))
net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
torch.manual_seed(env.rank)
model = nn.parallel.DistributedDataParallel(net) if env.world_size > 1 else net
optimizer = NLCG(net.parameters(), lr=0.1, precond="bfgs")
sampler = GlobalBatchSampler(len(data), 24, seed=0)
checkpoints = Checkpointer(folder / "checkpoints", asynchronous="async" in sys.argv)
everything = {"model": net, "optimizer": optimizer, "sampler": sampler, "random": PerRank(RandomState())}
start = checkpoints.load_latest(**everything) or 0
for step in range(start, steps):
    with (folder / f"log-{env.rank}").open("a") as log:
        print(env.restart_count, env.world_size, step, os.getpid(), time.time(), file=log)
    parts, weights = micro_batches(next(sampler), env.rank, env.world_size)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(data[parts[0]]), labels[parts[0]])
    (loss * weights[0] * env.world_size / 24).backward()
    optimizer.step()
    time.sleep(pause)
    flag = torch.tensor(float(stopped))
    if env.world_size > 1:
        torch.distributed.all_reduce(flag)
    if flag or step % 3 == 2 or step == steps - 1:
        checkpoints.save(step + 1, **everything)
    if flag:
        checkpoints.wait()
        shutdown()
        sys.exit(143)
checkpoints.wait()
if env.rank == 0:
    torch.save([p.detach() for p in net.parameters()], folder / "weights.pt")
shutdown()
