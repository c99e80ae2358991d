"""ModuleState: all of a LightningModule's training that changes, as bytes and back."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError
from trainer.state import STEPS_AN_EPOCH, TrainState


@dataclass(kw_only=True, eq=False)
class ModuleState(TrainState):
    """A TrainState whose training is Lightning's.

    optimizer is the first of those that the module made, and averages there are none. At the
    quarter of the first epoch its bytes hold the reports alone: what Lightning adds up over an
    epoch can't be kept, so a training that is resumed from there begins anew, and makes that
    report no second time.
    """

    trainer: Any
    """Lightning's; None when it has done its work."""
    loops: Mapping[str, Any]
    """How far Lightning's loops are, by their own count."""

    def _learnt(self) -> dict[str, Any]:
        """Raises ConfigError if what the module adds to a checkpoint is no plain value."""
        return {"lightning": self._lightning(), "loops": dict(self.loops)}

    def _lightning(self) -> dict[str, Any]:
        if self.step % STEPS_AN_EPOCH:
            return {}
        if self.trainer is None:
            return {"state_dict": self.model.state_dict()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lightning.ckpt"
            self.trainer.save_checkpoint(path)
            try:
                found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises whatever a file leads to
                raise ConfigError(
                    f"backbone {self.config.backbone}: its checkpoint can't be read without "
                    "running code: what on_save_checkpoint, callbacks and schedulers keep must be "
                    "tensors and plain values"
                ) from error
        return found
