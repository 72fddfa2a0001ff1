"""The command behind ``make bench``, ``bench-quick``, ``bench-gpu`` and ``bench-growth``."""

import argparse
import logging
from pathlib import Path

import torch

from benchmarks.measure import apart
from benchmarks.suite import QUICK, STANDARD, run_gpu, run_growth, run_suite

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line and run one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=("cpu", "gpu", "growth"), nargs="?", default="cpu")
    parser.add_argument("--size", choices=("small", "base"), default="base", help="of the models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tokens", type=int, nargs="+", help="growth: numbers of tokens of the loss; 0 for none")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="growth: numbers of words")
    parser.add_argument("--megabytes", type=int, nargs="+", help="growth: sizes of the corpora; 0 for none")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.suite == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("make bench-gpu needs a CUDA device, and torch finds none; make bench runs on the CPU")
        run_gpu(out=arguments.out)
    elif arguments.suite == "growth":
        given = {name: getattr(arguments, name) for name in ("tokens", "vocabularies", "megabytes")}
        run_growth(apart, out=arguments.out, **{name: value for name, value in given.items() if value})
    else:
        torch.set_num_threads(1)
        run_suite(apart, STANDARD if arguments.size == "base" else QUICK, out=arguments.out)


if __name__ == "__main__":
    main()
