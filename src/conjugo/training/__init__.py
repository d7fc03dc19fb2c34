"""Training: data, models, optimizers by name, and the loop that brings them together.

``train(TrainConfig(...))`` trains a model and evaluates it; with ``out=`` it leaves a run directory from which an
interrupted run goes on, bit for bit. ``trainer.py`` is the loop, and meant to be read.
"""

from conjugo.training.config import TrainConfig, TrainResult
from conjugo.training.trainer import Trainer, train

__all__ = ["TrainConfig", "TrainResult", "Trainer", "train"]
