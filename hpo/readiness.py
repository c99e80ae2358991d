"""What a worker makes sure of before it claims a trial: its device and the study's networks.

What is missing here is the machine's fault and would fail every trial. So the worker leaves with
the reason, and no trial is touched.
"""

from hpo.spec import StudySpec
from trainer.config import ConfigError


def check_device(spec: StudySpec, device: str) -> None:
    """Raises ConfigError if the device isn't there, does not compute, or not in the study's
    precision. Imports torch.
    """
    import torch

    from trainer.device import check_precision, prepare

    try:
        prepare(device, 1)
        found = torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{device} can't be used: {said}") from error
    if found != 8:
        raise ConfigError(f"{device} computes wrongly: eight ones add up to {found}")
    if spec.given_precision is not None:
        check_precision(spec.given_precision, device)


def check_networks(spec: StudySpec) -> None:
    """Raises ConfigError for a network of the study, or a package, that isn't installed here."""
    from trainer.backbones import find_backbone
    from trainer.balance import imported_smote

    for name in spec.space.choices("backbone"):
        find_backbone(name)
    if "smote" in spec.space.choices("balance"):
        imported_smote()
