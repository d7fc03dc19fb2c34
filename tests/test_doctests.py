"""The examples in docstrings are true; they take ``torch`` and the names of their module for granted."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import conjugo


def modules() -> list[str]:
    found = pkgutil.walk_packages(conjugo.__path__, "conjugo.", onerror=lambda _: None)
    return ["conjugo", *(m.name for m in found if not m.name.endswith(("__main__", "_kernels")))]


@pytest.mark.parametrize("name", modules())
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
