"""Find out what each choice of the tutorial costs: last4 again and again, each time with one change.

    python -m benchmarks.ablation --root data/quarter [--seeds 777 1 2] [--only NAME ...] [--trainer.precision X]

Other options go to every run. Run again, it goes on with what is missing; changes without a run yet are left out of
the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.training import mean_and_std, train
from src.callbacks.history import Row
from src.files import replacing
from src.model.vgg import VGGBackbone
from src.process import cores

EPOCHS = 16
VIEWS = 4
BASE = "the tutorial's recipe"
_MILD = ["--data.augmentation", "{rotation: 0, shift: 0, zoom: 0, flip: true, crop: 4}"]
CHANGES: dict[str, list[str]] = {
    BASE: [],
    "pixels as the weights expect them": ["--data.standardize=weights"],
    "blue for red and red for blue": [],  # its weights are made by `mirrored_colours`
    "no augmentation": ["--data.augmentation=null"],
    "flip and 4-pixel shift": _MILD,
    "flip, 4-pixel shift, cutout 8": [_MILD[0], _MILD[1].replace("}", ", cutout: 8}")],
    "CutMix on half the images": ["--data.cutmix=0.5"],
    "flip, 4-pixel shift, CutMix on half the images": [*_MILD, "--data.cutmix=0.5"],
    "rate 3e-5": ["--model.optimizer=torch.optim.Adam", "--model.optimizer.init_args.lr=3e-5"],
    "rate 3e-4": ["--model.optimizer=torch.optim.Adam", "--model.optimizer.init_args.lr=3e-4"],
    "cosine decay": ["--unfreezing.decay=cosine"],
    "label smoothing 0.1": ["--model.label_smoothing=0.1"],
    "weight decay 0.05 (AdamW)": [
        "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=1e-4",
        "--model.optimizer.init_args.weight_decay=0.05",
    ],
    "Muon": [
        "--model.optimizer=src.model.muon.Muon", "--model.optimizer.init_args.lr=1e-4",
        "--model.optimizer.init_args.weight_decay=0",
    ],
    "dropout 0.5": ["--model.dropout=0.5"],
    "averaged weights (EMA 0.999)": [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
        "--trainer.callbacks.decay=0.999",
    ],
    "linear head": ["--model.hidden=0"],
    "0 layers train": ["--unfreezing.stages={0: 0}"],
    "8 layers train": ["--unfreezing.stages={0: 8}"],
    "staged: 0, 4, then 8 layers": ["--unfreezing.stages={0: 0, 2: 4, 5: 8}"],
    "8 layers, rates lower by 0.5 a block": ["--unfreezing.stages={0: 8}", "--unfreezing.block_factor=0.5"],
    "12 layers train": ["--unfreezing.stages={0: 12}"],
    "12 layers train, always new views": ["--unfreezing.stages={0: 12}", "--feature_cache.views=null"],
    "18 layers train, always new views": ["--unfreezing.stages={0: all}"],  # with nothing frozen nothing is cached
    "images enlarged to 48 pixels": ["--data.input_size=48"],
    "images enlarged to 64 pixels": ["--data.input_size=64"],
}  # fmt: skip


def mirrored_colours(folder: Path) -> list[str]:
    """Save the weights so that they take red for blue, as if images came in the wrong channel order."""
    path = folder / "blue-for-red.pth"
    if not path.exists():
        backbone = VGGBackbone()
        backbone.load("IMAGENET1K_FEATURES")
        weights = backbone.state_dict()
        weights["block1_conv1.weight"] = weights["block1_conv1.weight"].flip(1)
        with replacing(path) as temporary:
            torch.save(weights, temporary)
    return [f"--model.weights={path}", "--model.weights_input=IMAGENET1K_FEATURES"]


def run(root: Path, folder: Path, change: str, seed: int, more: list[str]) -> list[Row]:
    """Train last4 with one change."""
    words = ["--config=configs/last4.yaml", "--config=configs/with/folder.yaml"]
    words += [f"--data.source.init_args.root={root}", f"--seed_everything={seed}", f"--feature_cache.views={VIEWS}"]
    words += ["--feature_cache.limit_gib=8", *CHANGES[change], *more]
    if change == "blue for red and red for blue":
        words += mirrored_colours(folder)
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{change} {seed}")
    return train(folder, name, EPOCHS, words)


def table(found: dict[str, dict[int, list[Row]]]) -> str:
    """Write the best validation accuracy of each change and how far it is from the base, seed by seed."""
    text = f"{cores()} CPU cores; {EPOCHS} epochs, {VIEWS} views.\n\n"
    text += "| change | seeds | best val/acc | difference | last val/acc | last train/acc | training, s |\n"
    text += "|---|---|---|---|---|---|---|\n"
    best = {
        change: {seed: max(row["val/acc"] for row in rows if "val/acc" in row) for seed, rows in by_seed.items()}
        for change, by_seed in found.items()
    }
    for change, by_seed in found.items():
        last = [[row for row in rows if "val/acc" in row][-1] for rows in by_seed.values()]
        columns = [change, str(len(last)), mean_and_std([*best[change].values()])]
        pairs = [best[change][seed] - best[BASE][seed] for seed in by_seed if seed in best[BASE]]
        columns += ["" if change == BASE else mean_and_std(pairs)]
        columns += [mean_and_std([row[name] for row in last]) for name in ("val/acc", "train/acc")]
        columns += [f"{sum(sum(r['train_seconds'] for r in rows) for rows in by_seed.values()) / len(last):,.0f}"]
        text += f"| {' | '.join(columns)} |\n"
    return text


def main() -> None:
    """Run what is asked for, and write the table after each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[777])
    parser.add_argument("--only", nargs="+", default=[*CHANGES], choices=[*CHANGES], metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    options, more = parser.parse_known_args()
    found: dict[str, dict[int, list[Row]]] = {}
    for seed in options.seeds:
        for change in dict.fromkeys([BASE, *options.only]):
            found.setdefault(change, {})[seed] = run(options.root, options.output, change, seed, more)
            (options.output / "ablation.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
