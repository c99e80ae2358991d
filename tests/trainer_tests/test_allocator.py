"""Freed memory stays with a training process: its steps touch no new pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.device import prepare
from trainer.optim import make_optimizer
import torch
torch.set_num_threads(1)
if sys.argv[1] == "prepared":
    prepare("cpu", 1)
config = TrainConfig(backbone="smallcnn")
model = build(config, input_size=(1, 28, 28), num_classes=10)
optimizer = make_optimizer(config, model)
images = torch.linspace(-1, 1, 128 * 784).view(128, 1, 28, 28)

def step():
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()

for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def faults_a_step(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_steps_of_a_prepared_process_touch_next_to_no_new_pages() -> None:
    # one layer's activations are 3,136 pages
    assert 3 * faults_a_step("prepared") < faults_a_step("as it is")
