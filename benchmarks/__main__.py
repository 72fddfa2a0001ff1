"""The command behind ``make bench``, ``bench-quick``, ``bench-train``, ``bench-gpu`` and ``bench-growth``."""

import argparse
import logging
from pathlib import Path

import torch

from benchmarks.measure import apart
from benchmarks.suite import QUICK, STANDARD, run_gpu, run_growth, run_suite
from benchmarks.training import run_training

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line and run one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=("cpu", "train", "gpu", "growth"), nargs="?", default="cpu")
    parser.add_argument("--size", choices=("small", "base"), default="base", help="of the models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tokens", type=int, nargs="+", help="growth: numbers of tokens of the loss; 0 for none")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="growth: numbers of words")
    parser.add_argument("--megabytes", type=int, nargs="+", help="growth: sizes of the corpora; 0 for none")
    parser.add_argument("--teacher", help="train: a masked teacher's hub id or folder; a small one is made without it")
    parser.add_argument("--text", nargs="+", default=(), help="train: text files; synthetic text without them")
    parser.add_argument("--steps", type=int, default=15, help="train: optimizer steps of each training")
    parser.add_argument("--rounds", type=int, default=2, help="train: trainings of each kind, in turn")
    parser.add_argument("--threads", type=int, help="train: of each training; all cores without it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.suite == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("make bench-gpu needs a CUDA device, and torch finds none; make bench runs on the CPU")
        run_gpu(out=arguments.out)
    elif arguments.suite == "train":
        names = ("teacher", "text", "steps", "rounds", "threads")
        run_training(out=arguments.out, **{name: getattr(arguments, name) for name in names})
    elif arguments.suite == "growth":
        given = {name: getattr(arguments, name) for name in ("tokens", "vocabularies", "megabytes")}
        run_growth(apart, out=arguments.out, **{name: value for name, value in given.items() if value})
    else:
        torch.set_num_threads(1)
        run_suite(apart, STANDARD if arguments.size == "base" else QUICK, out=arguments.out)


if __name__ == "__main__":
    main()
