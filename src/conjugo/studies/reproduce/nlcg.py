"""Adya, Palakkode & Tuzel 2018: nonlinear conjugate gradients for training with very large mini-batches."""

from __future__ import annotations

from conjugo.studies.reproduce.nlcg_cifar import cifar100
from conjugo.studies.reproduce.nlcg_cpu import cpu
from conjugo.studies.reproduce.nlcg_imagenet import imagenet
from conjugo.studies.reproduce.paper import Paper

__all__ = ["PAPER"]

PAPER = Paper(
    title="Nonlinear Conjugate Gradients For Scaling Synchronous Distributed DNN Training",
    source="S. Adya, V. Palakkode, O. Tuzel, arXiv:1812.02886 (2018)",
    scales={"cpu": cpu, "gpu": cifar100, "full": imagenet},
)
