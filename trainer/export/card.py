"""model_card.md: for people, what a model is, how it was found, how good it is, how to load it.

Follows the sections of Mitchell et al. 2019 as far as something is known. What a user named (data,
classes, parameters) is written so that it can't be Markdown or HTML.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.config import flat
from trainer.export.card_files import format_table, loading, safety
from trainer.export.card_text import number, safe, share, table

_MOST_CLASSES = 200
"""With more classes than these, the card points to metrics.json."""


def model_card(
    manifest: Mapping[str, Any], tested: Mapping[str, Any], *, pictures: Iterable[str]
) -> str:
    """The card's text. tested: as final_metrics gives it; pictures: the PNG files there are."""
    parts = [
        _summary(manifest, tested),
        _data(manifest),
        _search(manifest),
        _candidates(manifest, tested),
        _training(manifest),
        _test(manifest, tested),
        _pictures(set(pictures)),
        _limits(manifest, tested),
        format_table(manifest),
        loading(manifest),
        safety(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(manifest: Mapping[str, Any], tested: Mapping[str, Any]) -> str:
    channels, height, width = manifest["input_size"]
    low, high = tested["ci95"]
    return (
        f"# Image classifier for {safe(manifest['data']['source'])}\n\n"
        f"{safe(manifest['config']['backbone'])}, {len(manifest['class_names'])} classes. Test "
        f"accuracy **{share(tested['accuracy'])}** (95 % interval {share(low)} to {share(high)}, "
        f"{tested['num_images']:,} images). It takes uint8 images (N,{channels},{height},{width}) "
        "and returns logits (N,classes): normalisation is inside it, decoding and resizing are not."
    )


def _data(manifest: Mapping[str, Any]) -> str:
    data, names = manifest["data"], manifest["class_names"]
    counts = data["images"]
    lines = [
        "## Data",
        f"Source: {safe(data['source'])}, fingerprint `{safe(data['fingerprint'])}`. Trained on "
        f"{sum(counts['train']):,} images, validated on {sum(counts['val']):,}, tested on "
        f"{sum(counts['test']):,}.",
    ]
    if not sum(counts["val"]):
        lines.append("The validation images of the search are among those trained on.")
    if len(names) <= _MOST_CLASSES:
        rows = zip(map(safe, names), counts["train"], counts["val"], counts["test"], strict=True)
        lines.append(table(("class", "train", "validation", "test"), rows))
    return "\n\n".join(lines)


def _search(manifest: Mapping[str, Any]) -> str:
    found, trial = manifest.get("search"), manifest.get("trial")
    lines = ["## Search"]
    if not isinstance(found, Mapping):
        lines.append("How the model was searched for isn't recorded here.")
    else:
        lines.append(
            f"{number(found.get('num_trials'))} trials ({number(found.get('complete'))} complete, "
            f"{number(found.get('pruned'))} pruned, {number(found.get('failed'))} failed), "
            f"{number(found.get('num_epochs'))} epochs, {number(found.get('seconds'))} seconds. "
            "Tried:"
        )
        space = found.get("space") or {}
        lines.append(
            "\n".join(f"- {safe(key)}: {_choice(values)}" for key, values in space.items())
        )
    if isinstance(trial, Mapping):
        params = ", ".join(
            f"{safe(key)} {number(value)}" for key, value in trial.get("params", {}).items()
        )
        lines.append(
            f"Best: trial {number(trial.get('number'))}, validation {_objective(manifest)[0]} "
            f"{share(trial.get('value'))} in the search ({params})."
        )
    return "\n\n".join(line for line in lines if line)


def _objective(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """What the search judged by: in words, and its name among the metrics of the test."""
    name = str(manifest.get("objective", "accuracy"))
    return safe(name.replace("_", " ")), "macro_recall" if name == "balanced_accuracy" else name


def _choice(values: Any) -> str:
    """A field of a space file in words."""
    if isinstance(values, Mapping):
        scale = ", logarithmic" if values.get("log") else ""
        return f"{number(values.get('low'))} to {number(values.get('high'))}{scale}"
    if isinstance(values, Sequence) and not isinstance(values, str):
        return "one of " + ", ".join(number(value) for value in values)
    return f"always {number(values)}"


def _candidates(manifest: Mapping[str, Any], tested: Mapping[str, Any]) -> str:
    trial, candidates = manifest.get("trial"), manifest.get("candidates") or []
    head = "## Does the search's value hold up?"
    trained = [found for found in candidates if found.get("values")]
    if not trained:
        if not isinstance(trial, Mapping) or trial.get("value") is None:
            return ""
        return (
            f"{head}\n\nNo candidate was trained again. The value that won a search is too high in "
            f"the mean; here it is {share(trial['value'])}, and "
            f"{share(tested[_objective(manifest)[1]])} on the test images."
        )
    rows = (
        (
            number(found.get("number")),
            share(found.get("search_value")),
            share(found.get("mean")),
            share(found.get("std")),
            ", ".join(share(value) for value in found["values"]),
        )
        for found in trained
    )
    text = [
        head,
        f"Candidates trained again with fresh seeds; validation {_objective(manifest)[0]}:",
        table(("trial", "in the search", "mean", "std", "values"), rows),
    ]
    winner = trial.get("number") if isinstance(trial, Mapping) else None
    for found in trained:
        if found.get("number") == winner and found.get("search_value") is not None:
            excess = found["search_value"] - found["mean"]
            how = "too high" if excess >= 0 else "too low"
            text.append(f"The winner's value in the search was {share(abs(excess))} {how}.")
    return "\n\n".join(text)


def _training(manifest: Mapping[str, Any]) -> str:
    config = flat(manifest["config"])
    fields = ", ".join(f"{safe(key)} {number(value)}" for key, value in config.items())
    lines = ["## Training", fields + "."]
    averaging = manifest.get("averaging")
    if isinstance(averaging, Mapping):
        rows = (
            (safe(name), share(tried.get("mean")), ", ".join(map(share, tried.get("values") or [])))
            for name, tried in (averaging.get("tried") or {}).items()
        )
        lines.append(
            f"Averages of weights, on validation; chosen: {safe(averaging.get('chosen'))}."
        )
        lines.append(table(("average", "mean", "values"), rows))
        soup = averaging.get("soup")
        if isinstance(soup, Mapping):
            lines.append(
                f"A soup (equal parts) of {len(soup.get('values') or [])} models from the same "
                f"weights came to {share(soup.get('value'))} on validation, its models to "
                f"{share(soup.get('mean of its models'))} in the mean."
            )
    return "\n\n".join(lines)


def _test(manifest: Mapping[str, Any], tested: Mapping[str, Any]) -> str:
    low, high = tested["ci95"]
    lines = [
        "## Test",
        f"Accuracy {share(tested['accuracy'])} (95 % interval {share(low)} to {share(high)}, "
        f"Wilson), macro recall {share(tested['macro_recall'])}, macro F1 "
        f"{share(tested['macro_f1'])}, expected calibration error "
        f"{share(tested['expected_calibration_error'])} (15 bins), negative log-likelihood "
        f"{share(tested['negative_log_likelihood'])}, on {tested['num_images']:,} images.",
    ]
    openings = manifest.get("test_openings")
    if isinstance(openings, int):
        lines.append(
            "The test images were opened once, after the last decision."
            if openings == 1
            else f"The test images were opened {openings} times: choosing by their result makes it "
            "too good."
        )
    if len(tested["per_class"]) <= _MOST_CLASSES:
        rows = (
            (
                safe(c["class"]),
                share(c["precision"]),
                share(c["recall"]),
                share(c["f1"]),
                c["support"],
            )
            for c in tested["per_class"]
        )
        lines.append(table(("class", "precision", "recall", "F1", "images"), rows))
    return "\n\n".join(lines)


def _pictures(pictures: set[str]) -> str:
    lines = []
    if "confusion_matrix.png" in pictures:
        lines.append("![Confusion matrix](confusion_matrix.png)")
    if "curves.png" in pictures:
        lines.append("![Training curves](curves.png)")
    else:
        lines.append("Training curves weren't handed over.")
    return "\n\n".join(lines)


def _limits(manifest: Mapping[str, Any], tested: Mapping[str, Any]) -> str:
    _, height, width = manifest["input_size"]
    weak = min(tested["per_class"], key=lambda found: float(found["recall"]))
    return "\n".join(
        [
            "## What it is not for",
            "",
            f"- Pictures of anything but these {len(manifest['class_names'])} classes: it names "
            "one of them for every picture, noise too.",
            "- Pictures from another source (camera, light, country, year): the test images come "
            "from the same source as the training images, and nothing is known beyond it.",
            f"- Details smaller than what {width} x {height} pixels show.",
            "- Decisions about people, or where a mistake does harm, without a test made for that: "
            f"the weakest class, {safe(weak['class'])}, is found in {share(weak['recall'])} of its "
            "pictures.",
            "- Probabilities taken at their word: see the calibration error above.",
        ]
    )
