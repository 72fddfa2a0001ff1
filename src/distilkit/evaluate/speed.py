"""Size and speed of models, each beside the others in one run (arXiv 1910.01108, table 3)."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.evaluate.candidate import Candidate, Sentences, load_candidate
from distilkit.evaluate.onnx_export import PACKAGES, export_onnx, missing_packages, open_session, quantize_int8
from distilkit.evaluate.rows import FileSplit, HubSplit, read_examples
from distilkit.language_model import num_parameters, num_parameters_without_embeddings
from distilkit.records import Result, cost, model_name, processor
from distilkit.timing import (
    Batch,
    Pass,
    latency,
    onnx_pass,
    seconds_in_turn,
    throughput,
    times_faster,
    torch_pass,
    torch_threads,
)

log = logging.getLogger(__name__)

Switch = Literal["auto"] | bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measure a model's size and speed beside those of others, on real sentences.

    What is timed is the forward pass in float32 (and in int8) of batches that are tokenized and on the device already.

    Raises:
        UserError: a value is out of range, there is no such device, or ONNX is wanted and not installed.
    """

    name: str
    against: str | Sequence[str]
    data_dir: str | None
    hub: HubSplit
    skip_malformed: bool
    max_sentences: int | None
    max_length: int
    batch_sizes: Sequence[int]
    warm_up: int
    rounds: int
    devices: str | Sequence[str]
    threads: int | None
    onnx: Switch
    int8: Switch

    def __post_init__(self) -> None:
        """Check the values before a model is loaded."""
        least = {"max_sentences": 1, "max_length": 8, "warm_up": 0, "rounds": 1, "threads": 1}
        for key, limit in least.items():
            value = getattr(self, key)
            if value is not None and value < limit:
                raise UserError(f"task.{key}={value}, but it must be at least {limit}")
        sizes = self.batch_sizes
        if isinstance(sizes, int) or len(sizes) != 2 or min(sizes) < 1:
            raise UserError(
                f"task.batch_sizes={sizes}, but it takes two sizes of at least 1, for latency and for "
                "throughput; the paper's are [1,32]"
            )
        self._devices()
        self._runtimes()

    def _devices(self) -> list[str]:
        if self.devices == "auto":
            return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        names = [self.devices] if isinstance(self.devices, str) else list(self.devices)
        for name in names:
            if name != "cpu" and not name.startswith("cuda"):
                raise UserError(f"task.devices={name}, but it takes auto, cpu and cuda")
            if name != "cpu" and not torch.cuda.is_available():
                raise UserError(f"task.devices={name}, but there is no CUDA here; set task.devices=cpu")
        if not names:
            raise UserError("task.devices is empty; it takes auto, cpu and cuda")
        return names

    def _runtimes(self) -> list[str]:
        """Name the ONNX models to make: onnx, onnx-int8."""
        for key, value in (("onnx", self.onnx), ("int8", self.int8)):
            if value not in ("auto", True, False):
                raise UserError(f"task.{key}={value}, but it takes auto, true and false")
        absent, on_cpu = missing_packages(), "cpu" in self._devices()
        wanted = [key for key in ("onnx", "int8") if getattr(self, key) is True]
        if wanted and absent:
            raise UserError(
                f"task.{wanted[0]}=true needs {', '.join(PACKAGES)}, and {', '.join(absent)} cannot be imported: "
                "pip install 'distilkit[onnx]'"
            )
        if wanted and not on_cpu:
            raise UserError(f"task.{wanted[0]}=true is timed on the CPU; add cpu to task.devices")
        if self.int8 is True and self.onnx is False:
            raise UserError("task.int8=true is made from the ONNX model; set task.onnx=true")
        if self.onnx is False or absent or not on_cpu:
            return []
        return ["onnx"] if self.int8 is False else ["onnx", "onnx-int8"]

    def sentences(self) -> Sentences:
        """Read the sentences, or pairs of them, ``max_sentences`` spread evenly over all.

        Raises:
            UserError: they cannot be read, or there is none.
        """
        path = Path(self.data_dir).expanduser() if self.data_dir is not None else None
        if path is not None and not path.exists():
            raise UserError(f"task.data_dir={self.data_dir} does not exist; give GLUE's folder, or a .txt file")
        if path is not None and path.is_file():
            found = [(line,) for line in TextFiles(paths=str(path), document="line").documents()]
            if not found:
                raise UserError(f"task.data_dir={self.data_dir} has no sentence; it takes one a line")
        else:
            found = self._pairs(path)
        number = min(self.max_sentences or len(found), len(found))
        return [found[index * len(found) // number] for index in range(number)]

    def _pairs(self, path: Path | None) -> list[Any]:
        split: HubSplit | FileSplit = self.hub
        if path is not None:
            folder = path / "STS-B" if (path / "STS-B").is_dir() else path
            split = FileSplit(folder=folder, file="dev.tsv", columns={"label": "score"})
        examples = read_examples(
            split,
            texts=("sentence1", "sentence2"),
            label="label",
            labels=None,
            aliases={},
            skip_malformed=self.skip_malformed,
        )
        return [example.texts for example in examples]

    def measure(self, *, model: str, revision: str, tokenizer: str | None, name: str, seed: int) -> list[Result]:
        """Measure one model and then each of ``against``; ``tokenizer`` is None for the model's own.

        Raises:
            UserError: a model, a tokenizer or the sentences cannot be read or do not fit each other, a model is given
                twice, or one cannot be exported to ONNX.
        """
        sentences = self.sentences()
        candidates: list[Candidate] = []
        sources = [model, *([self.against] if isinstance(self.against, str) else self.against)]
        for source in sources:
            if source in [candidate.source for candidate in candidates]:
                raise UserError(f"{source!r} is given twice; task.against takes other models than model=, each once")
            own_name = model_name(source) if candidates else name
            candidate = load_candidate(
                source,
                revision="main" if candidates else revision,
                tokenizer=None if candidates else tokenizer,
                # Two runs may have folders of one name.
                name=source if own_name in [candidate.name for candidate in candidates] else own_name,
                sentences=sentences,
                batch_sizes=self.batch_sizes,
                max_length=self.max_length,
                seed=seed,
            )
            candidates.append(candidate)
        with torch_threads(self.threads) as threads, tempfile.TemporaryDirectory() as folder:
            for number, candidate in enumerate(candidates):
                self._export(candidate, Path(folder, str(number)))
            with torch.inference_mode():
                self._time_all(candidates, num_sentences=len(sentences), threads=threads)
        details = {"num_sentences": len(sentences), "threads": threads, "rounds": self.rounds}
        return [self._result(candidate, candidates[1:], details, seed=seed) for candidate in candidates]

    def _export(self, candidate: Candidate, folder: Path) -> None:
        """Make the ONNX models of a candidate in a new folder, and note their sizes."""
        for runtime in self._runtimes():
            log.info("%s: making the %s model", candidate.name, runtime)
            own = folder / runtime
            if runtime == "onnx":
                example = candidate.batches[0][0]
                file = export_onnx(candidate.model, own, example=example, name=candidate.name)
            else:
                file = quantize_int8(candidate.onnx_files["onnx"], own)
            candidate.onnx_files[runtime] = file
            size = sum(part.stat().st_size for part in own.iterdir()) / 1e6
            candidate.scores["onnx_mb" if runtime == "onnx" else "onnx_int8_mb"] = size

    def _time_all(self, candidates: list[Candidate], *, num_sentences: int, threads: int) -> None:
        """Time all on one device and in one runtime after the other."""
        for device in self._devices():
            makers = [partial(torch_pass, candidate.model, device=device) for candidate in candidates]
            self._time(device, candidates, makers, num_sentences=num_sentences)
        for runtime in self._runtimes():
            sessions = [open_session(candidate.onnx_files[runtime], threads=threads) for candidate in candidates]
            makers = [partial(onnx_pass, session) for session in sessions]
            self._time(f"cpu/{runtime}", candidates, makers, num_sentences=num_sentences)

    def _time(
        self,
        place: str,
        candidates: list[Candidate],
        makers: Sequence[Callable[[Sequence[Batch]], Pass]],
        *,
        num_sentences: int,
    ) -> None:
        """Time small batches, then large ones; the keys of the scores begin with ``place``."""
        measures: list[Callable[..., dict[str, float]]] = [latency, partial(throughput, num_sentences=num_sentences)]
        for which, measure in enumerate(measures):
            size = self.batch_sizes[which]
            log.info("%s: %d models in turn, batches of %d, %d rounds", place, len(candidates), size, self.rounds)
            passes = [make(candidate.batches[which]) for make, candidate in zip(makers, candidates, strict=True)]
            seconds = seconds_in_turn(passes, warm_up=self.warm_up, rounds=self.rounds)
            for candidate, own in zip(candidates, seconds, strict=True):
                candidate.scores |= {f"{place}/{key}": value for key, value in measure(own).items()}
                candidate.seconds += float(own.sum())
                candidate.tokens += self.rounds * candidate.num_tokens

    def _result(
        self, candidate: Candidate, against: Sequence[Candidate], details: dict[str, Any], *, seed: int
    ) -> Result:
        devices = self._devices()
        settings = {key: value for key, value in asdict(self).items() if key not in ("against", "hub", "data_dir")}
        ratios = {
            other.name: times_faster(candidate.scores, other.scores) for other in against if other is not candidate
        }
        return Result(
            name=candidate.name,
            model=candidate.source,
            sha256=candidate.sha256,
            model_type=candidate.model.config.model_type,
            parameters=num_parameters(candidate.model),
            parameters_without_embeddings=num_parameters_without_embeddings(candidate.model),
            task=self.name,
            kind="speed",
            seed=seed,
            settings={
                **settings,
                "batch_sizes": list(self.batch_sizes),
                "devices": devices,
                "data": self.data_dir or str(self.hub),
            },
            scores=candidate.scores,
            score=None,
            details={
                "against": ratios,
                **details,
                **candidate.details,
                "processors": {device: processor(device) for device in devices},
            },
            cost=cost(seconds=candidate.seconds, tokens=candidate.tokens, device=devices[-1]),
        )
