"""What reading a folder of pictures costs, and what duplicates across the splits are worth.

    python -m benchmarks.data [--pictures 5000] [--seeds 5]      writes benchmarks/data.json

Reading: a made folder of pictures of mixed sizes, formats and modes, one in 167 of them broken,
read by us and by torchvision's ImageFolder with PIL (one process, and a DataLoader's two), scaled
to the same side; then by us again, as a second launch does, and with a limit on memory.

Duplicates: Fashion-MNIST pictures, some of them there again re-encoded, resized or brightened. A
small backbone is trained and tested on a split drawn with and without regard to them, and tested
on pictures that are nobody's copies.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpo.measured import machine

NUM_CLASSES = 10
BROKEN_SHARE = 30 / 5000
SIDE = 160
MEMORY_LIMIT = 64 * 2**20
ROUNDS = 3
"""Of the reading; the fastest of each counts."""


def make_folder(folder: Path, num_pictures: int, seed: int = 0) -> int:
    """Photograph-like pictures, some broken; returns how many are."""
    values = np.random.default_rng(seed)
    num_broken = round(num_pictures * BROKEN_SHARE)
    broken = set(values.choice(num_pictures, num_broken, replace=False).tolist())
    for number in range(num_pictures):
        below = folder / f"class-{number % NUM_CLASSES}"
        below.mkdir(parents=True, exist_ok=True)
        path = save(below / f"{number:05d}", photograph(values), number)
        if number in broken:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if number % 2 else b"no picture")
    return num_broken


def photograph(values: np.random.Generator) -> Image.Image:
    """Smooth shapes with some grain, 300 to 1,200 pixels wide."""
    width, height = (int(side) for side in values.integers(300, 1200, 2))
    shapes = Image.fromarray(values.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = values.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def save(stem: Path, image: Image.Image, number: int) -> Path:
    """In one of ten ways: mostly JPEG and PNG, with each mode among them."""
    kind = number % 20
    if kind < 12:
        path = stem.with_suffix(".jpg")
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == 0 else 1
        image.convert("L" if kind == 1 else "RGB").save(path, quality=88, exif=exif)
    elif kind == 12:
        path = stem.with_suffix(".jpeg")
        image.convert("CMYK").save(path, quality=88)
    elif kind < 18:
        path = stem.with_suffix(".png")
        modes = {13: "RGBA", 14: "P", 15: "L"}
        small = image.resize((image.width // 2, image.height // 2))
        small.convert(modes.get(kind, "RGB")).save(path, compress_level=3)
    elif kind == 18:
        path = stem.with_suffix(".webp")
        image.save(path, quality=80)
    else:
        path = stem.with_suffix(".tif")
        gray = np.asarray(image.convert("L"), dtype=np.uint16) * 257
        Image.fromarray(gray).save(path)
    return path


def read_ours(folder: Path, max_memory_bytes: int | None = None) -> dict[str, Any]:
    """In a process of its own: seconds, peak memory, and the pictures that came of it."""
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--read", str(folder)]
        + ([] if max_memory_bytes is None else ["--limit", str(max_memory_bytes)]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(shown.stdout)
    return result


def read_here(folder: Path, max_memory_bytes: int | None) -> None:
    """The reading itself, and two epochs of batches in an order like a training's."""
    import torch

    from trainer.data.options import DataOptions
    from trainer.data.registry import load

    torch.zeros(1)
    peak_bytes()
    before = peak_bytes()
    started = time.perf_counter()
    data = load(
        str(folder),
        seed=0,
        options=DataOptions(image_size=SIDE, max_memory_bytes=max_memory_bytes),
    )
    seconds = time.perf_counter() - started
    read = peak_bytes()
    images = data.train.images
    for _ in range(2):
        for chosen in torch.split(torch.randperm(len(images)), 64):
            images.index_select(0, chosen)
    result = {
        "seconds": round(seconds, 2),
        "pictures": data.findings.num_pictures,
        "broken": len(data.findings.unusable),
        "mib_of_images": round((len(data.train) + len(data.val)) * images[0].nbytes / 2**20),
        "mib_more_reading": round((read - before) / 2**20),
        "mib_more_training": round((peak_bytes() - before) / 2**20),
    }
    print(json.dumps(result))


def peak_bytes() -> int:
    """Of this process's resident memory since the last call, mapped files and all."""
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    return int(peak.split()[1]) * 1024


def read_torchvision(folder: Path, num_workers: int) -> float:
    """Seconds that ImageFolder with PIL takes for the pictures that it can read."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    blank = Image.new("RGB", (SIDE, SIDE))

    def or_blank(path: str) -> Image.Image:
        try:
            image: Image.Image = default_loader(path)
        except OSError:
            return blank  # ImageFolder itself ends at the first broken file
        return image

    scale = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.PILToTensor()])
    pictures = ImageFolder(str(folder), transform=scale, loader=or_blank)
    loader = torch.utils.data.DataLoader(pictures, batch_size=64, num_workers=num_workers)
    started = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - started


def measure_reading(num_pictures: int) -> dict[str, Any]:
    """Images per second, ours beside torchvision's, and what the second launch takes."""
    with tempfile.TemporaryDirectory(prefix="hpo-bench-") as below:
        folder = Path(below) / "pictures"
        num_broken = make_folder(folder, num_pictures)
        firsts, ones, twos = [], [], []
        for number in range(ROUNDS):  # in turn, for the machine may be shared
            os.environ["HPO_HOME"] = str(Path(below) / f"home-{number}")
            firsts.append(read_ours(folder))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twos.append(read_torchvision(folder, 2))
                ones.append(read_torchvision(folder, 0))
        first = min(firsts, key=lambda result: float(result["seconds"]))
        one, two = min(ones), min(twos)
        second = read_ours(folder)
        limited = read_ours(folder, MEMORY_LIMIT)
    assert first["broken"] == num_broken
    rates = {
        "ours": num_pictures / first["seconds"],
        "imagefolder_1_process": num_pictures / one,
        "imagefolder_2_workers": num_pictures / two,
    }
    return {
        "pictures": num_pictures,
        "broken": num_broken,
        "side": SIDE,
        "images_per_second": {name: round(rate) for name, rate in rates.items()},
        "seconds_of_the_rounds": {
            "ours": [result["seconds"] for result in firsts],
            "imagefolder_1_process": [round(seconds, 1) for seconds in ones],
            "imagefolder_2_workers": [round(seconds, 1) for seconds in twos],
        },
        "ratio_to_1_process": round(rates["ours"] / rates["imagefolder_1_process"], 2),
        "ratio_to_2_workers": round(rates["ours"] / rates["imagefolder_2_workers"], 2),
        "first": first,
        "second": second,
        "limited": {"limit_mib": MEMORY_LIMIT // 2**20, **limited},
    }


def main() -> None:
    """Both parts, or with --read the reading of one folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.read:
        read_here(options.read, options.limit)
        return
    from benchmarks.leak import measure_leak

    result = {
        "machine": machine(),
        "reading": measure_reading(options.pictures),
        "duplicates": measure_leak(options.seeds),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
