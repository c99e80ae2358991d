import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.optim import clip_gradients, lr_at, make_optimizer, set_lr


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
    )


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_weights_are_decayed_but_norms_and_biases_are_not(name: str, kind: type) -> None:
    model = network()
    optimizer = make_optimizer(config(optimizer=name, weight_decay=0.1), model)
    assert isinstance(optimizer, kind)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]


def test_sgd_has_nesterov_momentum_and_adam_takes_it_as_beta1() -> None:
    sgd = make_optimizer(config(optimizer="sgd", momentum=0.8), network())
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.8, True)
    plain = make_optimizer(config(optimizer="sgd", momentum=0), network())
    assert plain.param_groups[0]["nesterov"] is False
    adam = make_optimizer(config(optimizer="adamw", momentum=0.8), network())
    assert adam.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_fused_kernels_compute_what_the_plain_ones_do(name: str) -> None:
    results = []
    for fused in (True, False):
        model = network()
        optimizer = make_optimizer(config(optimizer=name), model)
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False
        images = torch.linspace(-1, 1, 512).view(8, 1, 8, 8)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 3)
            torch.autograd.backward(loss)
            optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        ("adam", partial(torch.optim.Adam, betas=(0.9, 0.999))),
        ("adamw", partial(torch.optim.AdamW, betas=(0.9, 0.999))),
    ],
)
def test_steps_and_saved_states_are_those_of_torch_to_the_last_bit(name: str, plain: Any) -> None:
    chosen = config(optimizer=name, lr=0.1, weight_decay=0.01)
    mine, theirs = network(), network()
    own = make_optimizer(chosen, mine)
    groups = make_optimizer(chosen, theirs).param_groups
    whole = plain(
        [{key: group[key] for key in ("params", "weight_decay")} for group in groups],
        lr=0.1,
        fused=True,
    )
    for step in range(4):
        if step == 2:  # as if resumed
            content = own.state_dict()
            own = make_optimizer(chosen, mine)
            own.load_state_dict(content)
        for model, optimizer in ((mine, own), (theirs, whole)):
            optimizer.zero_grad()
            images = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8) + step
            model(images).square().mean().backward()
            optimizer.step()
    for parameter, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert parameter.equal(other)
        assert parameter.requires_grad
    saved, other_saved = own.state_dict()["state"], whole.state_dict()["state"]
    assert saved.keys() == other_saved.keys()
    for index, tensors in saved.items():
        assert all(tensor.equal(other_saved[index][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_parameters_whose_first_gradient_comes_later_step_as_in_the_plain_kernels(
    name: str, momentum: float
) -> None:
    results = []
    for fused in (True, False):
        model = network()
        optimizer = make_optimizer(config(optimizer=name, momentum=momentum, lr=0.01), model)
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False
        images = torch.linspace(-1, 1, 512).view(8, 1, 8, 8)
        for trained in ([], ["4.weight", "4.bias"], ["4.weight"], ["0.weight"], None, ["4.bias"]):
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(trained is None or parameter_name in trained)
            optimizer.zero_grad()
            if trained != []:
                loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 3)
                torch.autograd.backward(loss)
            optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_training_starts_without_importing_the_compiler() -> None:
    program = """
import sys
from trainer.config import TrainConfig
from trainer.data.digits import load
from trainer.device import choose_plan
from trainer.flops import training_flops
from trainer.loop import train
data = load(seed=0)
about = {"input_size": data.input_size, "num_classes": data.num_classes}
for optimizer in ("sgd", "adam", "adamw"):
    config = TrainConfig(backbone="smallcnn", epochs=1, optimizer=optimizer, average="ema")
    plan = choose_plan(config, device="cpu", **about)
    training_flops(config, **about)
    for report in train(config, data, plan):
        report.state.to_bytes()
print([name for name in ("torch._dynamo", "torchvision", "sympy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    optimizer = make_optimizer(config(), model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_set_lr_reaches_every_group() -> None:
    optimizer = make_optimizer(config(), network())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def lrs(schedule: str, *progress: float) -> list[float]:
    return [lr_at(config(lr=2.0, schedule=schedule), p) for p in progress]


def test_constant_stays() -> None:
    assert lrs("constant", 0, 0.5, 1) == [2, 2, 2]


def test_step_falls_tenfold_at_half_and_at_three_quarters() -> None:
    assert lrs("step", 0, 0.49, 0.5, 0.74) == pytest.approx([2, 2, 0.2, 0.2])
    assert lrs("step", 0.75, 1) == pytest.approx([0.02, 0.02])


def test_cosine_warms_up_and_ends_at_zero() -> None:
    assert lrs("cosine", 0, 0.025, 0.05) == pytest.approx([0.08, 1.04, 2])
    assert lrs("cosine", 0.525, 1) == pytest.approx([1, 0])


def test_onecycle_is_that_of_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    num_steps = 101
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2.0, total_steps=num_steps, pct_start=31 / 101, cycle_momentum=False
    )
    for step in range(num_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert lrs("onecycle", step / (num_steps - 1)) == pytest.approx([expected], abs=1e-12)
        optimizer.step()
        if step < num_steps - 1:
            schedule.step()


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "onecycle"])
def test_no_learning_rate_is_negative_or_beyond_the_peak(schedule: str) -> None:
    values = lrs(schedule, *(index / 1000 for index in range(1001)))
    assert min(values) >= 0
    assert max(values) == pytest.approx(2.0)


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_gradients([parameter], 0)
    assert parameter.grad.tolist() == [3, 4]
    clip_gradients([parameter], 10)
    assert parameter.grad.tolist() == pytest.approx([3, 4])
    clip_gradients([parameter], 1)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
