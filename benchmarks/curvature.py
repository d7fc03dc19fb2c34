"""Spectral densities of Hessians beside those of other PyTorch libraries: time, memory, error per product, two processes.

Peers are used where they are installed: `pip install curvlinops-for-pytorch==3.0.1 hessian-eigenthings==1.0.0a5`, after which a
torchvision that does not fit the torch here may have to be uninstalled again. PyHessian 0.1 of PyPI calls `torch.eig`, which
torch no longer has, so it takes a checkout: `git clone https://github.com/amirgholami/PyHessian`, and its path in PYHESSIAN.

`python -m benchmarks.curvature products speed memory accuracy processes` runs the parts that are named.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._processes import run
from benchmarks._timing import interleave, ratio, show
from conjugo import curvature

PROBES, STEPS = 10, 80
OURS = "conjugo"
Data = Any
"""Batches (X, y): a list, or a DataLoader."""
Spectrum = tuple[np.ndarray, np.ndarray]
"""Nodes, and weights that sum to 1."""


# ---- networks and data ------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A transformer over the 16 patches of 2 x 2 pixels of a digit: two blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 64)
        self.place = nn.Parameter(torch.randn(16, 64) * 0.1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x.view(-1, 1, 8, 8), 2, stride=2).transpose(1, 2)
        return self.head(self.blocks(self.embed(patches) + self.place).mean(1))


class Block(nn.Module):
    """Attention with four heads, written out: the fused kernels have no second derivative; then a layer of 256 units."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.wide, self.back = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, places, 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, places, width))
        return x + self.back(F.gelu(self.wide(self.between(x))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": cnn, "transformer": Patches}


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 64 pixels in [0, 1] of scikit-learn, in an order that mixes the classes, and their labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def batches(size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """All digits, in batches of *size* (the last is smaller), or in one."""
    x, y = digits()
    return [(x, y)] if size is None else list(zip(x.split(size), y.split(size)))


def trained(make: Callable[[], nn.Module], steps: int = 60) -> nn.Module:
    """A network after some steps of Adam, away from the symmetries of a fresh one."""
    torch.manual_seed(0)
    model = make()
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:512]), y[:512]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


# ---- libraries --------------------------------------------------------------------------------------------------------


@dataclass
class Library:
    """How a library is asked for the Hessian of the mean cross entropy, a product, and nodes and weights."""

    start: Callable[[nn.Module, Data], Any]
    product: Callable[[Any, Tensor], Tensor]
    probes: Callable[[Any, int, int, int], list[Spectrum]]
    """operator, probes, steps, seed -> spectra to be averaged"""


def _pyhessian() -> Library:
    if path := os.environ.get("PYHESSIAN"):
        sys.path.insert(0, path)
    module = importlib.import_module("pyhessian.hessian")

    def start(model: nn.Module, data: Data) -> Any:
        source: Any = {"data": data[0]} if len(data) == 1 else {"dataloader": data}
        return module.hessian(model, F.cross_entropy, cuda=False, **source)

    def product(operator: Any, v: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in operator.params]), operator.params)]
        if operator.full_dataset:
            found = operator.dataloader_hv_product(pieces)[1]
        else:
            found = module.hessian_vector_product(operator.gradsH, operator.params, pieces)
        return torch.cat([piece.reshape(-1) for piece in found])

    def probes(operator: Any, count: int, steps: int, seed: int) -> list[Spectrum]:
        torch.manual_seed(seed)
        # Its weights come from a solver for general matrices, as complex numbers; its own plots take the real parts.
        nodes, weights = operator.density(iter=steps, n_v=count)
        return [(np.array(n, float), np.real(np.array(w)).astype(float)) for n, w in zip(nodes, weights)]

    return Library(start, product, probes)


def _eigenthings() -> Library:
    module = importlib.import_module("hessian_eigenthings")

    def start(model: nn.Module, data: Data) -> Any:
        return module.HessianOperator(model, data, module.supervised_loss(F.cross_entropy))

    def probes(operator: Any, count: int, steps: int, seed: int) -> list[Spectrum]:
        found = module.spectral_density(operator, num_runs=count, lanczos_steps=steps, seed=1000 * seed)
        pairs = zip(found.raw_eigenvalues, found.raw_weights)
        return [(n[w > 0].double().numpy(), w[w > 0].double().numpy()) for n, w in pairs]

    return Library(start, lambda operator, v: operator.matvec(v), probes)


def _curvlinops() -> Library:
    with warnings.catch_warnings():  # a dependency of it uses torch.jit.script
        warnings.simplefilter("ignore")
        module = importlib.import_module("curvlinops")
        lanczos = importlib.import_module("curvlinops.papyan2020traces.spectrum").fast_lanczos

    def start(model: nn.Module, data: Data) -> Any:
        parameters = list(model.parameters())
        return module.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)

    def probes(operator: Any, count: int, steps: int, seed: int) -> list[Spectrum]:
        # lanczos_approximate_spectrum runs ARPACK for the range of the spectrum besides; that is left out here.
        torch.manual_seed(seed)
        pairs = [lanczos(operator, steps) for _ in range(count)]
        return [(nodes.double().numpy(), vectors[0].square().double().numpy()) for nodes, vectors in pairs]

    return Library(start, lambda operator, v: operator @ v, probes)


def _conjugo(deflate: bool = True, cache: Any = "auto") -> Library:
    def start(model: nn.Module, data: Data) -> Any:
        return curvature.hessian(model, F.cross_entropy, data, cache=cache)

    def probes(operator: Any, count: int, steps: int, seed: int) -> list[Spectrum]:
        found = curvature.spectral_density(operator, probes=count, steps=steps, seed=seed, deflate=deflate)
        # Deflated eigenvalues have a mass of 1/P each in every spectrum of the average.
        exact = np.asarray(found.eigenvalues, dtype=float).reshape(-1)
        mass = np.full(len(exact), 1 / operator.size)
        return [
            (np.concatenate([exact, n.numpy()]), np.concatenate([mass, w.numpy()]))
            for n, w in zip(found.nodes, found.weights)
        ]

    return Library(start, lambda operator, v: operator @ v, probes)


LIBRARIES: dict[str, Callable[[], Library]] = {
    OURS: _conjugo,
    "PyHessian, HEAD": _pyhessian,
    "hessian-eigenthings 1.0": _eigenthings,
    "curvlinops": _curvlinops,
}


FRUGAL = f"{OURS}, cache=False"
VARIANTS = {**LIBRARIES, FRUGAL: partial(_conjugo, cache=False)}


def libraries() -> dict[str, Library]:
    """Those that are installed; says which are not."""
    found = {}
    for name, make in LIBRARIES.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: not installed, left out ({error})")
    return found


# ---- time -------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is timed in a round: *probes* probes of *steps* steps; the first product of an operator is timed apart."""

    network: str
    batch: int | None
    loader: bool
    rounds: int
    probes: int
    steps: int


PLANS = [
    Plan("MLP", None, False, 3, PROBES, STEPS),
    Plan("MLP", 256, False, 3, 2, STEPS),
    Plan("MLP", 256, True, 3, 2, STEPS),
    Plan("CNN", None, False, 5, 2, 20),
    Plan("CNN", 256, True, 3, 2, 20),
    Plan("transformer", None, False, 3, 2, 20),
    Plan("transformer", 256, True, 3, 2, 20),
]


def speed() -> None:
    """Time of a density, with what an operator costs before its first product."""
    found = libraries()
    for plan in PLANS:
        model = trained(NETWORKS[plan.network])
        size = sum(p.numel() for p in model.parameters())
        data: Any = batches(plan.batch)
        if plan.loader:
            data = DataLoader(TensorDataset(*digits()), batch_size=plan.batch)
        _agree(found, model, data)
        setup: dict[str, list[float]] = {name: [] for name in found}
        whole: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(plan.rounds + 1):
            for name, library in found.items():
                first, rest = _density(library, model, data, plan, turn)
                if turn:  # the first turn warms up
                    setup[name].append(first)
                    whole[name].append(first + rest * PROBES * STEPS / (plan.probes * plan.steps))
        _rows(plan, size, setup, whole)


def _density(library: Library, model: nn.Module, data: Data, plan: Plan, seed: int) -> tuple[float, float]:
    """Processor seconds up to and with the first product, and of the density after it."""
    model = copy.deepcopy(model)
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(seed))
    gc.collect()
    begin = time.process_time()
    operator = library.start(model, data)
    library.product(operator, v / v.norm())
    middle = time.process_time()
    library.probes(operator, plan.probes if seed else 1, plan.steps if seed else 5, seed)
    end = time.process_time()
    _release(model)
    return middle - begin, end - middle


def _release(model: nn.Module) -> None:
    """PyHessian leaves gradients with their graphs on the parameters: a cycle that keeps all activations."""
    for p in model.parameters():
        p.grad = None
    gc.collect()


def _agree(found: dict[str, Library], model: nn.Module, data: Data) -> None:
    """Print how far a product of each library is from that of one batch, by double backward in float64."""
    x, y = digits()
    exact = copy.deepcopy(model).double()
    parameters = list(exact.parameters())
    v = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
    pieces = [piece.view_as(p) for piece, p in zip(v.double().split([p.numel() for p in parameters]), parameters)]
    gradients = torch.autograd.grad(F.cross_entropy(exact(x.double()), y), parameters, create_graph=True)
    wanted = torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradients, parameters, pieces)])
    errors = []
    for name, library in found.items():
        mine = copy.deepcopy(model)
        product = library.product(library.start(mine, data), v).double()
        errors.append(f"{name} {float((product - wanted).norm() / wanted.norm()):.0e}")
        _release(mine)
    print("error of a product: " + ", ".join(errors))


def _rows(plan: Plan, size: int, setup: dict[str, list[float]], whole: dict[str, list[float]]) -> None:
    rows = []
    for name, times in whole.items():
        ratios = _compared(whole, name)
        first, total = statistics.median(setup[name]), statistics.median(times)
        per_step = 1e3 * (total - first) / (PROBES * STEPS)
        rows.append([name, f"{first:.2f}", f"{per_step:.1f}", f"{total:.1f}", *ratios])
    split = "one batch" if plan.batch is None else f"batches of {plan.batch}" + " from a DataLoader" * plan.loader
    full = (plan.probes, plan.steps) == (PROBES, STEPS)
    measured = "measured in full" if full else f"extrapolated from {plan.probes} x {plan.steps} and the first product"
    caption = (
        f"processor seconds of {PROBES} probes x {STEPS} steps, {measured}; ratio: ours to theirs, in the same round"
    )
    columns = ("library", "to 1st product s", "ms a step", f"s for {PROBES} x {STEPS}", "ratio", "quartiles")
    show(f"{plan.network}, {size:,} parameters, 1,797 digits, {split}", columns, rows, caption)


def _compared(seconds: dict[str, list[float]], name: str) -> list[str]:
    """Median and quartiles of our time to that of *name*."""
    if name == OURS or OURS not in seconds:
        return ["", ""]
    middle, low, high = ratio(seconds[OURS], seconds[name])
    return [f"{middle:.2f}", f"{low:.2f} - {high:.2f}"]


def products() -> None:
    """Time of a product once the operator has made its first ones."""
    found = libraries()
    for plan in (plan for plan in PLANS if not plan.loader):
        model, data = trained(NETWORKS[plan.network]), batches(plan.batch)
        _agree(found, model, data)
        copies = {name: copy.deepcopy(model) for name in found}
        operators = {name: library.start(copies[name], data) for name, library in found.items()}
        v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0))
        v /= v.norm()
        cases = {name: partial(library.product, operators[name], v) for name, library in found.items()}
        seconds = interleave(cases, rounds=9, warmup=2, clock=time.process_time)
        rows = [
            [name, f"{1e3 * statistics.median(times):.1f}", *_compared(seconds, name)]
            for name, times in seconds.items()
        ]
        split = "one batch" if plan.batch is None else f"batches of {plan.batch} in memory"
        title = f"Products, {plan.network}, {len(v):,} parameters, 1,797 digits, {split}"
        show(
            title,
            ("library", "ms", "ratio", "quartiles"),
            rows,
            "processor time; ratio: ours to theirs, in the same round",
        )
        for mine in copies.values():
            _release(mine)


# ---- memory -----------------------------------------------------------------------------------------------------------


KEPT = 20
"""Lanczos steps, and vectors kept, in the measurement of memory."""


def memory() -> None:
    """Peak of the resident memory of one probe, each in a process of its own."""
    names = [FRUGAL, *libraries()]
    for network in NETWORKS:
        model = trained(NETWORKS[network], steps=0)
        size = sum(p.numel() for p in model.parameters())
        kept = _activations(model)
        bound = ((2 + KEPT) * size * 4 + kept) / 2**20
        rows = []
        for batch in (None, 256):
            for name in names:
                command = [sys.executable, "-m", "benchmarks.curvature", "_peak", network, str(batch or 0), name]
                # Every freed tensor goes back to the kernel at once, so that the peak is that of memory in use.
                environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    print(f"{name}: failed\n{done.stderr}")
                peak = math.nan if done.returncode else float(done.stdout.split()[-1])
                split = "one batch" if batch is None else f"batches of {batch}"
                rows.append([f"{name}, {split}", f"{peak:.0f}", f"{peak / bound:.1f}"])
        parts = f"two gradients, {KEPT} Lanczos vectors, and {kept / 2**20:.0f} MiB that a forward pass over all digits keeps"
        caption = f"bound: {parts}: {bound:.0f} MiB; 1 probe x {KEPT} steps; without torch itself and the data"
        show(f"{network}, {size:,} parameters, 1,797 digits", ("library", "peak MiB", "to bound"), rows, caption)


def _activations(model: nn.Module) -> int:
    """Bytes that a forward pass over all digits keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(t)
        return t

    x, y = digits()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(model(x), y)
    return sum(kept.values())


def _peak(network: str, batch: str, name: str) -> None:
    """Print by how many MiB the peak of one probe is above the memory before, of this process."""
    library = VARIANTS[name]()
    model, data = trained(NETWORKS[network], steps=2), batches(int(batch) or None)
    # Kernels allocate once, and so does the first trace of any function: a small network takes that out of the measurement.
    small = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))
    library.probes(library.start(small, [(x[:16], y[:16]) for x, y in data]), 1, 3, 0)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    operator = library.start(model, data)
    library.probes(operator, 1, KEPT, 0)
    print(_status("VmHWM") - before)


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


# ---- accuracy ---------------------------------------------------------------------------------------------------------

SEEDS = range(6)


def accuracy() -> None:
    """Distance to the spectrum of the dense Hessian of a trained 64-12-10 network, at equal numbers of products."""
    model = trained(lambda: nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)), steps=400)
    data = batches()
    exact = _exact(model)
    spread, outliers = exact[-1] - exact[0], 10
    found = libraries()
    cases = {**found, f"{OURS}, deflate=False": _conjugo(deflate=False)}
    for count, steps in ((4, 40), (PROBES, STEPS)):
        rows, errors = [], {}
        for name, library in cases.items():
            mine = copy.deepcopy(model)
            operator = library.start(mine, data)
            spectra = [library.probes(operator, count, steps, seed) for seed in SEEDS]
            _release(mine)
            errors[name] = [wasserstein(s, exact) / spread for s in spectra]
            traces = [abs(sum(float(n @ w) for n, w in s) / count / exact.mean() - 1) for s in spectra]
            # A cut between the tenth and the eleventh eigenvalue: the true mass above is 10/P.
            cut = (exact[-outliers] + exact[-outliers - 1]) / 2
            masses = [abs(sum(w[n > cut].sum() for n, w in s) / count * len(exact) / outliers - 1) for s in spectra]
            ghosts = [_ghosts(n, exact) for s in spectra for n, _ in s]
            tops = [abs(max(n.max() for n, _ in s) / exact[-1] - 1) for s in spectra]
            rows.append([
                name, f"{statistics.mean(errors[name]):.1e}", "", f"{statistics.mean(traces):.1e}",
                f"{statistics.mean(masses):.1e}", f"{max(tops):.0e}", f"{statistics.mean(ghosts):.1f}",
            ])  # fmt: skip
        for row, values in zip(rows, errors.values()):
            row[2] = f"{statistics.mean(values) / statistics.mean(errors[OURS]):.1f}"
        columns = ("library", "W1 / range", "to ours", "trace", "mass of 10 outliers", "λ max", "ghosts")
        caption = (
            f"means over {len(SEEDS)} seeds; relative errors (λ max: the largest); ghosts: copies of λ max in a probe, "
            "besides it. float32 products; exact: eigenvalues of the dense Hessian in float64"
        )
        title = (
            f"Hessian of a trained network, P = {len(exact)}: {count} probes x {steps} steps = {count * steps} products"
        )
        show(title, columns, rows, caption)
    _more_probes(model, data, exact, found)


def _more_probes(model: nn.Module, data: Data, exact: np.ndarray, found: dict[str, Library]) -> None:
    """How the error falls with the number of probes: what a peer must spend to come as near. One stands for all."""
    counts, rows = (10, 40, 160), []
    peer = next((name for name in found if name != OURS), OURS)
    for name, library in ((name, found[name]) for name in found if name in (OURS, peer)):
        mine = copy.deepcopy(model)
        operator = library.start(mine, data)
        row = [name]
        for count in counts:
            seeds = range(50, 53 if count < 100 else 51)
            errors = [wasserstein(library.probes(operator, count, STEPS, seed), exact) for seed in seeds]
            row.append(f"{statistics.mean(errors) / (exact[-1] - exact[0]):.1e}")
        _release(mine)
        rows.append(row)
    show(f"W1 / range by the number of probes, {STEPS} steps each", ("library", *map(str, counts)), rows)


def _exact(model: nn.Module) -> np.ndarray:
    x, y = digits()
    model = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(parameters.items(), flat.split(sizes))
        return F.cross_entropy(functional_call(model, {n: v.view_as(p) for (n, p), v in pieces}, (x.double(),)), y)

    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    matrix = hessian(loss)(flat)
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()


def wasserstein(spectra: Sequence[Spectrum], eigenvalues: np.ndarray) -> float:
    """Area between the distribution functions of the mean of *spectra* and of the eigenvalues (sorted)."""
    nodes = np.concatenate([n for n, _ in spectra] + [eigenvalues])
    weights = [w / len(spectra) for _, w in spectra] + [np.full(len(eigenvalues), -1 / len(eigenvalues))]
    order = np.argsort(nodes)
    difference = np.cumsum(np.concatenate(weights)[order])
    return float(np.abs(difference[:-1]) @ np.diff(nodes[order]))


def _ghosts(nodes: np.ndarray, exact: np.ndarray) -> int:
    """Nodes at the largest eigenvalue, less one; it is simple, and well away from the next."""
    return max(int((np.abs(nodes - exact[-1]) < 1e-3 * (exact[-1] - exact[-2])).sum()) - 1, 0)


# ---- processes --------------------------------------------------------------------------------------------------------

PRODUCTS = 4


def processes() -> None:
    """Products on two processes that have half of the data each, beside one process that has all."""
    rows = []
    for network in NETWORKS:
        alone, both, kept = run(2, _shared, network)
        middle, low, high = ratio(alone, both)
        ms = [f"{1e3 * statistics.median(times) / PRODUCTS:.1f}" for times in (alone, both)]
        rows.append([network, *ms, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", f"{kept:.0e}"])
    columns = ("network", "ms, 1 process", "ms, 2 processes", "speed-up", "quartiles", "difference")
    caption = (
        f"wall clock of {PRODUCTS} products, one thread a process, gloo, one batch a process; only where two cores are free. "
        "Alone: rank 0, while rank 1 waits"
    )
    show("Products of the Hessian over 1,797 digits", columns, rows, caption)


def _shared(network: str, rounds: int = 7) -> tuple[list[float], list[float], float]:
    """Seconds alone and together, in turns, and the relative difference of a product."""
    rank = dist.get_rank()
    model = trained(NETWORKS[network])
    x, y = digits()
    half = len(y) // 2
    mine = (x[:half], y[:half]) if rank == 0 else (x[half:], y[half:])
    together = curvature.hessian(model, F.cross_entropy, mine, process_group=dist.group.WORLD)
    alone_group = dist.new_group([0])  # all ranks make it; else the operator would be one of all ranks
    single = curvature.hessian(model, F.cross_entropy, (x, y), process_group=alone_group) if rank == 0 else None
    v = torch.randn(together.size, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # enough for any choice between methods to be made
        product = together @ v
        expected = product if single is None else single @ v
    difference = float((product - expected).norm() / expected.norm())
    alone, both = [], []
    for _ in range(rounds):
        if single is not None:
            alone.append(_seconds(partial(single.matvec, v)))
        dist.barrier()
        both.append(_seconds(partial(together.matvec, v)))
        dist.barrier()
    return alone, both, difference


def _seconds(product: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    for _ in range(PRODUCTS):
        product()
    return time.perf_counter() - begin


PARTS: dict[str, Callable[[], None]] = {
    "products": products, "speed": speed, "memory": memory, "accuracy": accuracy, "processes": processes,
}  # fmt: skip


def main(parts: Sequence[str] = tuple(PARTS)) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    if sys.argv[1:2] == ["_peak"]:
        torch.set_num_threads(1)
        _peak(*sys.argv[2:])
    else:
        main(sys.argv[1:] or tuple(PARTS))
