"""The head of a network, its last layer or two, and the stages of what lies before it."""

from collections.abc import Sequence

from torch import nn

from trainer.config import TrainConfig


class TwoLayerHead(nn.Sequential):
    """Linear, ReLU, Dropout, Linear: (N,in) -> (N,out)."""

    def __init__(self, num_inputs: int, hidden: int, dropout: float, num_outputs: int) -> None:
        super().__init__(
            nn.Linear(num_inputs, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_outputs),
        )


def head_name(model: nn.Module) -> str:
    """The head's name: the two-layer head's if there is one, else that of the last linear layer.

    Raises ValueError if the network has no linear layer.
    """
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    names = [name for name, module in modules if isinstance(module, TwoLayerHead)]
    names += [name for name, module in modules if isinstance(module, nn.Linear)][-1:]
    if not names:
        raise ValueError("a classifier ends in a linear layer")
    return names[0]


def is_below(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a parameter or module is one of these modules or stands in one of them."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def widen_head(model: nn.Module, config: TrainConfig) -> None:
    """Put a two-layer head in the place of the last layer, if the config asks for one."""
    if not config.head_hidden:
        return
    name = head_name(model)
    last = model.get_submodule(name)
    assert isinstance(last, nn.Linear)
    head = TwoLayerHead(last.in_features, config.head_hidden, config.dropout, last.out_features)
    model.set_submodule(name, head)


def stage_of(name: str, stages: Sequence[Sequence[str]], head: str) -> int:
    """Which stage a parameter belongs to: 0 is nearest to the image, len(stages) the head.

    What is in no stage stands between the last one and the head, and counts as the last one's.
    """
    if is_below(name, (head,)):
        return len(stages)
    for index, stage in enumerate(stages):
        if is_below(name, stage):
            return index
    return len(stages) - 1


def num_trained_stages(trainable: str, num_stages: int, progress: float) -> int:
    """How many of the last stages are trained, beside the head, at this share of all steps.

    gradual: one more each time that an equal part of the first half of the training is done
    (Howard & Ruder 2018).
    """
    if trainable == "all":
        return num_stages
    if trainable == "head":
        return 0
    if trainable == "gradual":
        return min(num_stages, int(2 * num_stages * progress))
    return min(num_stages, int(trainable.removeprefix("last")))


def freeze(
    model: nn.Module, trainable: str, stages: Sequence[Sequence[str]], progress: float
) -> None:
    """Have only those parameters trained that are to be at this share of all steps.

    The batch norm of a frozen stage uses the statistics that it has (call it after model.train()).
    """
    if trainable == "all":
        return
    head = head_name(model)
    first = len(stages) - num_trained_stages(trainable, len(stages), progress)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage_of(name, stages, head) >= first)
    for name, module in model.named_modules():
        if name and not list(module.children()) and stage_of(name, stages, head) < first:
            module.eval()
