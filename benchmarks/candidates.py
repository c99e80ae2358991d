"""The truth about all candidates of the 30-trial study, the runner-up's with the winner's.

    python -m benchmarks.candidates     about ten minutes of two cores; writes
                                        benchmarks/fashion-mnist-30/truth.json

`hpo best` opens the test split for the winner alone, after its last decision. Here each candidate
is trained on train and validation together with seeds that neither the search nor the re-checks
had, and tested on all 10,000 test images: would the runner-up have been the better choice?
"""

import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from hpo.measured import machine

STUDY = Path(__file__).parent / "fashion-mnist-30"
EPOCHS = 5
SEEDS = (1_001, 1_002, 1_003, 1_004, 1_005)


def test_accuracy(given: tuple[dict[str, Any], int]) -> float:
    """One training on 60,000 images. given: what the trial searched, and a seed."""
    import torch

    from trainer.config import TrainConfig
    from trainer.data.registry import load
    from trainer.device import DevicePlan
    from trainer.evaluate import evaluate
    from trainer.loop import train

    params, seed = given
    torch.set_num_threads(1)
    plan = DevicePlan(device="cpu", num_threads=1, channels_last=True)
    whole = load("fashion-mnist", seed=0).with_validation_in_training()
    config = TrainConfig.from_dict({**params, "epochs": EPOCHS, "seed": seed})
    *_, last = train(config, whole, plan)
    test = whole.open_test()
    return evaluate(last.state.model, test, plan, mean=whole.mean, std=whole.std).accuracy


def main() -> None:
    """All trainings, one a core at a time."""
    candidates = json.loads((STUDY / "best.json").read_text())["candidates"]
    trials = {t["number"]: t for t in json.loads((STUDY / "trials.json").read_text())}
    tasks = [(trials[c["number"]]["params"], seed) for c in candidates for seed in SEEDS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(test_accuracy, tasks, chunksize=1)
    rows = []
    for place, candidate in enumerate(candidates):
        values = found[place * len(SEEDS) : (place + 1) * len(SEEDS)]
        spread = {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
        rows.append({**candidate, "test": {"n": len(values), **spread, "values": values}})
    result = {"machine": machine(), "epochs": EPOCHS, "seeds": SEEDS, "candidates": rows}
    (STUDY / "truth.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"trial {row['number']}: {row['test']['mean']:.4f} +- {row['test']['std']:.4f}")


if __name__ == "__main__":
    main()
