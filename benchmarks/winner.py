"""Does the winner hold up? Many tiny studies, and what is true of their winners.

    python -m benchmarks.winner [--studies 40]     goes on where it stopped; writes
                                                   benchmarks/winner.jsonl and winner.json

Each study searches smallcnn on 2,000 images of Fashion-MNIST (halved to 14x14 pixels, so that a
study takes a minute of a core) with 500 to validate; its best three
are trained again by the product's own worker, three seeds each. Then each is trained with a seed
that nobody has chosen by and tested on all 10,000 test images: the truth. One study a process, one
process a core.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.measured import machine
from storage.embedded import EmbeddedPostgres
from tests.parts import url_of

NUM_TRAIN, NUM_VAL = 2_000, 500
TRIALS, EPOCHS = 10, 4
TOP_K, SEEDS, TRUTH_SEEDS = 3, 3, 1
SMALL_TEST, DRAWS = 500, 50
LINES = Path(__file__).with_suffix(".jsonl")
SUMMARY = Path(__file__).with_suffix(".json")


def tiny(seed: int) -> Any:
    """Fashion-MNIST at 14x14 pixels, with the few images that this study has."""
    import torch

    from trainer.data.dataset import channel_statistics
    from trainer.data.fashion_mnist import load

    whole = load(seed=seed)
    chosen = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(seed))
    train = halved(whole.train.take(chosen[:NUM_TRAIN]))
    val = halved(whole.train.take(chosen[NUM_TRAIN : NUM_TRAIN + NUM_VAL]))
    mean, std = channel_statistics(train.images)
    return dataclasses.replace(
        whole,
        train=train,
        val=val,
        mean=mean,
        std=std,
        open_test=lambda: halved(whole.open_test()),
    )


def halved(split: Any) -> Any:
    """Images of half the height and width."""
    import torch

    small = torch.nn.functional.avg_pool2d(split.images.float(), 2)
    return type(split)(small.round().to(torch.uint8), split.labels)


def run_study(given: tuple[int, str]) -> dict[str, Any]:
    """Search, re-check and truth of one study. given: its seed, and a database's URL."""
    import torch

    from hpo.candidates import plan_recheck
    from hpo.launch import prepare_study
    from hpo.options import LaunchOptions
    from hpo.recheck import recheck
    from hpo.worker import Worker
    from storage.database import Database
    from storage.schema import ensure_tables
    from storage.snapshots import StudySnapshot, snapshot
    from storage.studies import StudyRecord
    from trainer.data import registry

    seed, url = given
    torch.set_num_threads(1)
    registry.SOURCES[f"tiny-{seed}"] = lambda *_: tiny(seed)
    database = Database(url)
    database.open()
    ensure_tables(database)

    def work(record: StudyRecord, **_: object) -> StudySnapshot:
        Worker(database, record.name, device="cpu").run()
        return snapshot(database, record.study_id)

    options = LaunchOptions(
        data=f"tiny-{seed}", trials=TRIALS, epochs=EPOCHS, seed=seed, backbones="smallcnn"
    )
    record = prepare_study(database, options)
    study = work(record)
    plan = plan_recheck(study, top_k=TOP_K, num_seeds=SEEDS, epochs=EPOCHS, most_share=math.inf)
    candidates = recheck(database, record, plan, run_workers=work)
    data = tiny(seed)
    test = data.open_test()
    rows = []
    for candidate in candidates:
        truth = [
            _truth(candidate.trial.attributes, data, test, 100 + index)
            for index in range(TRUTH_SEEDS)
        ]
        rows.append({**candidate.to_json(), "averages": candidate.averages, "truth": truth})
    database.engine.dispose()
    return {"seed": seed, "candidates": rows}


def _truth(attributes: Mapping[str, Any], data: Any, test: Any, index: int) -> dict[str, Any]:
    """Accuracy on all test images with a seed that nobody has chosen by, by kind of weights."""
    import torch

    from trainer.config import TrainConfig
    from trainer.device import DevicePlan
    from trainer.evaluate import classify
    from trainer.loop import train

    found = attributes["config"]
    config = TrainConfig.from_dict({**found, "seed": found["seed"] + 7_919 * index})
    plan = DevicePlan.from_dict({**attributes["plan"], "device": "cpu"})
    *_, last = train(config, data, plan, try_averages=("ema", "tail"))
    models = {"none": last.state.model, **last.state.averages.models()}
    hits = {
        name: classify(model, test.images, plan, mean=data.mean, std=data.std).argmax(1)
        == test.labels
        for name, model in models.items()
    }
    chance = torch.Generator().manual_seed(config.seed)
    draws = [
        int(hits["none"][torch.randperm(len(test), generator=chance)[:SMALL_TEST]].sum())
        for _ in range(DRAWS)
    ]
    accuracy = {name: float(each.double().mean()) for name, each in hits.items()}
    return {"accuracy": accuracy, "small_tests": draws}


def summarise(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures: differences in points of accuracy, each with its mean, spread and n."""
    firsts = [study["candidates"][0] for study in studies]
    chosen = [_chosen(study["candidates"], TOP_K, SEEDS) for study in studies]
    held = [
        low <= truth["accuracy"]["none"] <= high
        for study in studies
        for candidate in study["candidates"]
        for truth in candidate["truth"]
        for low, high in map(_interval, truth["small_tests"])
    ]
    wishes = itertools.product(range(1, TOP_K + 1), range(1, SEEDS + 1))
    return {
        "machine": machine(),
        "studies": len(studies),
        "search value - truth, best of the search": points(
            c["search_value"] - _true(c) for c in firsts
        ),
        "search value - re-checked mean, best of the search": points(
            c["search_value"] - c["mean"] for c in firsts
        ),
        "re-checked mean - truth, best of the search": points(c["mean"] - _true(c) for c in firsts),
        "search value - truth, chosen by re-check": points(
            c["search_value"] - _true(c) for c in chosen
        ),
        "re-checked mean - truth, chosen by re-check": points(c["mean"] - _true(c) for c in chosen),
        "truth of the chosen - truth of the search's best": {
            f"{k} candidates, {s} seeds": points(
                _true(_chosen(study["candidates"], k, s)) - _true(study["candidates"][0])
                for study in studies
            )
            for k, s in wishes
        },
        "the chosen is another than the search's best": statistics.fmean(
            after is not before for after, before in zip(chosen, firsts, strict=True)
        ),
        "averages, kept where they win on validation - last weights, on test": points(
            _kept(c) - _true(c) for c in chosen
        ),
        **{
            f"{name} always - last weights, on test": points(
                _true(c, name) - _true(c) for c in chosen
            )
            for name in ("ema", "tail")
        },
        f"95 % interval of {SMALL_TEST} test images holds the accuracy on all": {
            "share": statistics.fmean(held),
            "n": len(held),
        },
    }


def _chosen(candidates: Sequence[Mapping[str, Any]], k: int, s: int) -> Mapping[str, Any]:
    return max(candidates[:k], key=lambda c: statistics.fmean(c["values"][:s]))


def _true(candidate: Mapping[str, Any], average: str = "none") -> float:
    return statistics.fmean(truth["accuracy"][average] for truth in candidate["truth"])


def _kept(candidate: Mapping[str, Any]) -> float:
    means = {"none": candidate["mean"]}
    means |= {name: statistics.fmean(each) for name, each in candidate["averages"].items()}
    return _true(candidate, max(means, key=lambda name: (means[name], name == "none")))


def _interval(hits: int) -> tuple[float, float]:
    from trainer.evaluate import wilson_interval

    return wilson_interval(hits, SMALL_TEST)


def points(differences: Iterable[float]) -> dict[str, float]:
    """In points of accuracy: mean, standard deviation, standard error of the mean, n."""
    values = [100 * difference for difference in differences]
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return {
        "mean": round(statistics.fmean(values), 3),
        "std": round(std, 3),
        "standard_error": round(std / math.sqrt(len(values)), 3),
        "n": len(values),
    }


def main() -> None:
    """Run what is missing, in processes of one thread each, and sum up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.winner")
    parser.add_argument("--studies", type=int, default=40)
    wanted = range(parser.parse_args().studies)
    done = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    missing = [seed for seed in wanted if seed not in {study["seed"] for study in done}]
    with tempfile.TemporaryDirectory(prefix="hpo-winner") as folder:
        Path(folder).chmod(0o711)  # the server's user is another where root runs this
        os.environ["HPO_HOME"] = folder
        server = EmbeddedPostgres(Path(folder) / "pg")
        server.join()
        given = [(seed, url_of(server, "postgres")) for seed in missing]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            for study in pool.imap_unordered(run_study, given):
                done.append(study)
                with LINES.open("a") as lines:
                    lines.write(f"{json.dumps(study)}\n")
                print(f"study {study['seed']}: {len(done)} of {len(wanted)}", flush=True)
    summary = summarise([study for study in done if study["seed"] in wanted])
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
