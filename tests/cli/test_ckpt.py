"""``conjugo ckpt``: what it says, what it removes, its exit codes."""

import os

import pytest
import torch
from safetensors.torch import load_file

from conjugo.cli import main
from conjugo.distributed import Checkpointer


@pytest.fixture
def root(tmp_path):
    model = torch.nn.Linear(3, 2)
    checkpoints = Checkpointer(tmp_path / "run" / "checkpoints", keep=5)
    for step in (10, 20, 30):
        checkpoints.save(step, model=model, progress={"step": step})
    return tmp_path / "run" / "checkpoints"


def damage(root, step):
    path = root / f"step-{step:08}" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls(root, capsys):
    assert main(["ckpt", "ls", str(root.parent)]) == 0  # the run directory will do
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"]
    assert all("MiB" in line and line.rstrip().endswith("model, progress") for line in lines[1:])
    (root / "step-00000020" / "manifest.json").unlink()
    assert main(["ckpt", "ls", str(root)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_verify(root, capsys):
    assert main(["ckpt", "verify", str(root)]) == 0
    assert capsys.readouterr().out == "step 10: whole\nstep 20: whole\nstep 30: whole\n"
    damage(root, 20)
    assert main(["ckpt", "verify", str(root)]) == 1
    assert "__0_0.distcp is damaged: its checksum is" in capsys.readouterr().out.splitlines()[1]
    assert main(["ckpt", "verify", str(root), "--step", "30"]) == 0
    assert main(["ckpt", "verify", str(root), "--step", "4"]) == 2


def test_prune_never_removes_the_newest_good_step(root, capsys):
    damage(root, 30)
    assert main(["ckpt", "prune", str(root), "--keep", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("removed step 10\nremoved step 30: ")
    assert out.endswith("kept 20\n")
    assert os.listdir(root) == ["step-00000020"]
    damage(root, 20)
    assert main(["ckpt", "prune", str(root)]) == 1
    assert os.listdir(root) == ["step-00000020"]
    assert main(["ckpt", "prune", str(root), "--keep", "0"]) == 2


def test_export(root, tmp_path, capsys):
    assert main(["ckpt", "export", str(root), str(tmp_path / "w.safetensors")]) == 0
    assert capsys.readouterr().out == f"2 tensors of step 30: {tmp_path / 'w.safetensors'}\n"
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "w.safetensors").items()} == {
        "weight": (2, 3),
        "bias": (2,),
    }
    assert main(["ckpt", "export", str(root)]) == 2
    damage(root, 30)
    assert main(["ckpt", "export", str(root), str(tmp_path / "other.safetensors")]) == 1
    assert not (tmp_path / "other.safetensors").exists()


def test_no_checkpoints(tmp_path, capsys):
    assert main(["ckpt", "ls", str(tmp_path)]) == 1
    assert "there are no checkpoints in" in capsys.readouterr().err
