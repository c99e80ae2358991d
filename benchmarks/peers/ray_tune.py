"""Ray Tune with OptunaSearch and, where the task prunes, ASHA; actors are kept between trials.

    python -m benchmarks.peers.ray_tune TASK.json

As its documentation advises for many short trials: one CPU a trial, reuse_actors, the data read by
each trial, reports without checkpoints. Its usage statistics and its dashboard are off.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the task."""
    task = json.loads(Path(sys.argv[1]).read_text())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    ray.init(num_cpus=task["num_cores"], include_dashboard=False, log_to_driver=False)
    space = {
        "lr": tune.loguniform(*task["lr"]),
        "batch_size": tune.choice(task["batch_size"]),
        "backbone": tune.choice(task["backbone"]),
    }
    search = OptunaSearch(
        metric="value", mode="max", seed=task["seed"], points_to_evaluate=task["points"] or None
    )
    asha = ASHAScheduler(
        metric="value", mode="max", max_t=task["epochs"], grace_period=1, reduction_factor=4
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable(task), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=asha if task["prunes"] else None,
            num_samples=task["num_trials"],
            max_concurrent_trials=task["num_cores"],
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=task["journal"], verbose=0),
    )
    failed = [result.error for result in tuner.fit() if result.error]
    ray.shutdown()
    raise SystemExit(str(failed[0]) if failed else 0)


def trainable(task: dict[str, Any]) -> type:
    """The class that Tune's users write where actors are to be kept."""
    import torch
    from ray import tune

    from benchmarks.peers.training import Witness, trained

    class Training(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            torch.set_num_threads(1)
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            seed = int(self.trial_id.split("_")[-1]) if "_" in self.trial_id else 0
            self.params = {**new_config, "seed": seed}
            self.epoch, self.values = 0, trained(self.params, task)
            return True

        def step(self) -> dict[str, Any]:
            self.epoch, value = self.epoch + 1, next(self.values)
            Witness(task["witness"]).note(self.trial_id, self.epoch, value, self.params)
            return {"value": value, "done": self.epoch == task["epochs"]}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing is resumed here."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing is resumed here."""

    return Training


if __name__ == "__main__":
    main()
