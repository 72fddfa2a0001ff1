"""Size and speed of models, all timed in turn in one run (arXiv 1910.01108, table 3)."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.evaluate.job import Job
from distilkit.evaluate.models import described, inputs_of, load_task_model, load_task_tokenizer, weights_id
from distilkit.evaluate.rows import FileSplit, HubSplit, read_examples, rows_hash
from distilkit.export.onnx import PACKAGES, export_onnx, missing_packages, open_session, quantize_int8
from distilkit.language_model import max_positions, num_parameters
from distilkit.records import Result, cost, model_name, processor
from distilkit.timing import (
    Batch,
    latency,
    onnx_pass,
    seconds_in_turn,
    throughput,
    times_faster,
    torch_pass,
    torch_threads,
)

log = logging.getLogger(__name__)

Sentences = Sequence[tuple[str, ...]]  # each one text or a pair
Switch = Literal["auto"] | bool


@dataclass(kw_only=True)
class Candidate:
    """A model to be timed, its batches for latency, throughput and a whole pass, and its measurements so far."""

    job: Job
    model: PreTrainedModel
    batches: tuple[list[Batch], list[Batch]]
    whole: list[Batch]
    num_tokens: int
    scores: dict[str, float]
    details: dict[str, Any]
    onnx_files: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measure the size and speed of models on real sentences.

    Only the forward pass is timed, in float32 and in int8, on batches that are on the device already.
    """

    trains: ClassVar[bool] = False
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
    whole_pass: bool
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
                "throughput; the paper uses [1,32]"
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
                raise UserError(f"task.devices={name}, but CUDA is not available; set task.devices=cpu")
        if not names:
            raise UserError("task.devices is empty; it takes auto, cpu and cuda")
        return names

    def _runtimes(self) -> list[str]:
        """List the ONNX models to export: onnx, onnx-int8."""
        for key, value in (("onnx", self.onnx), ("int8", self.int8)):
            if value not in ("auto", True, False):
                raise UserError(f"task.{key}={value}, but it takes auto, true and false")
        absent, on_cpu = missing_packages(), "cpu" in self._devices()
        wanted = [key for key in ("onnx", "int8") if getattr(self, key) is True]
        if wanted and absent:
            raise UserError(
                f"task.{wanted[0]}=true needs {', '.join(PACKAGES)}, but {', '.join(absent)} cannot be imported: "
                "pip install 'distilkit[onnx]'"
            )
        if wanted and not on_cpu:
            raise UserError(f"task.{wanted[0]}=true is timed on the CPU; add cpu to task.devices")
        if self.int8 is True and self.onnx is False:
            raise UserError("task.int8=true needs the ONNX model; set task.onnx=true")
        if self.onnx is False or absent or not on_cpu:
            return []
        return ["onnx"] if self.int8 is False else ["onnx", "onnx-int8"]

    def sentences(self) -> Sentences:
        """Take ``max_sentences`` of all at even intervals."""
        found = self.all_sentences()
        number = min(self.max_sentences or len(found), len(found))
        return [found[index * len(found) // number] for index in range(number)]

    def all_sentences(self) -> Sentences:
        """Read sentences or pairs of sentences."""
        path = Path(self.data_dir).expanduser() if self.data_dir is not None else None
        if path is not None and not path.exists():
            raise UserError(f"task.data_dir={self.data_dir} does not exist; give GLUE's folder, or a .txt file")
        if path is not None and path.is_file():
            found: Sentences = [(line,) for line in TextFiles(paths=str(path), document="line").documents()]
            if not found:
                raise UserError(f"task.data_dir={self.data_dir} has no sentence; give a file with one a line")
        else:
            split: HubSplit | FileSplit = self.hub
            if path is not None:
                folder = path / "STS-B" if (path / "STS-B").is_dir() else path
                split = FileSplit(folder=folder, file="dev.tsv", columns={"label": "score"})
            columns: Any = {"texts": ("sentence1", "sentence2"), "label": "label", "labels": None, "aliases": {}}
            examples = read_examples(split, **columns, skip_malformed=self.skip_malformed)
            found = [example.texts for example in examples]
        return found

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the sentences, and return their hash."""
        return {"scored_data": rows_hash(self.sentences())}

    def measure(self, job: Job) -> list[Result]:
        """Measure one model and then each of ``against``."""
        sentences, every = self.sentences(), self.all_sentences() if self.whole_pass else ()
        candidates = [self.load(job, sentences, every)]
        for source in [self.against] if isinstance(self.against, str) else self.against:
            if source in [candidate.job.model for candidate in candidates]:
                raise UserError(f"{source!r} is given twice; task.against takes models other than model=, each once")
            taken = [candidate.job.name for candidate in candidates]
            name = source if model_name(source) in taken else model_name(source)  # two runs may share a folder's name
            sha256 = weights_id(source, revision="main")
            other = replace(job, model=source, revision="main", tokenizer=None, name=name, sha256=sha256)
            candidates.append(self.load(other, sentences, every))
        with torch_threads(self.threads) as threads, tempfile.TemporaryDirectory() as folder:
            for number, candidate in enumerate(candidates):
                self._export(candidate, Path(folder, str(number)))
            with torch.inference_mode():
                self._time_all(candidates, num_sentences=len(sentences), threads=threads)
        details = {"num_sentences": len(sentences), "threads": threads, "rounds": self.rounds}
        details |= {"pass_sentences": len(every)} if self.whole_pass else {}
        return [self._result(candidate, candidates[1:], details) for candidate in candidates]

    def load(self, job: Job, sentences: Sentences, every: Sentences = ()) -> Candidate:
        """Load a model and its tokenizer, and cut the sentences into batches of both sizes, and ``every`` one into 1s.

        A new head is random by the seed: neither size nor speed depends on its values.
        """
        hub: Any = {"revision": job.revision, "trust_remote_code": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            auto_class = AutoModelForSequenceClassification
            model = load_task_model(job.model, auto_class=auto_class, head={"num_labels": 1}, **hub).eval()
        vocabulary = model.get_input_embeddings().num_embeddings
        tokenizer = load_task_tokenizer(job.model, tokenizer=job.tokenizer, vocabulary=vocabulary, **hub)
        if model.config.pad_token_id is None:  # GPT-2 refuses batches without
            model.config.pad_token_id = tokenizer.pad_token_id
        model.config.use_cache = False  # nothing is generated
        sizes = ((sentences, self.batch_sizes[0]), (sentences, self.batch_sizes[1]), (every, 1))
        single, many, whole = (
            encode(some, tokenizer, model, batch_size=size, max_length=self.max_length) for some, size in sizes
        )
        num_tokens = sum(int(batch["attention_mask"].sum()) for batch in single)
        megabytes, file = file_size(job.model, num_params=num_parameters(model))
        return Candidate(
            job=job,
            model=model,
            batches=(single, many),
            whole=whole,
            num_tokens=num_tokens,
            scores={"file_mb": megabytes},
            details={"file": file, "tokens_per_sentence": num_tokens / len(sentences)},
        )

    def _export(self, candidate: Candidate, folder: Path) -> None:
        """Export a candidate to ONNX in a new folder, and record the sizes."""
        files, example = candidate.onnx_files, candidate.batches[0][0]
        for runtime in self._runtimes():
            log.info("%s: exporting the %s model", candidate.job.name, runtime)
            file, name = folder / runtime / "model.onnx", candidate.job.name
            if runtime == "onnx":
                export_onnx(candidate.model, file, example=example, name=name, cure="set task.onnx=false")
            else:
                quantize_int8(files["onnx"], file)
            files[runtime] = file
            size = sum(part.stat().st_size for part in file.parent.iterdir()) / 1e6
            candidate.scores[f"{runtime.replace('-', '_')}_mb"] = size

    def _time_all(self, candidates: list[Candidate], *, num_sentences: int, threads: int) -> None:
        """Time all candidates on each device and then in each runtime."""
        for device in self._devices():
            makers: list[Any] = [partial(torch_pass, candidate.model, device=device) for candidate in candidates]
            self._time(device, candidates, makers, num_sentences=num_sentences)
            if self.whole_pass:
                self._time_whole(device, candidates)
        for runtime in self._runtimes():
            files = [candidate.onnx_files[runtime] for candidate in candidates]
            makers = [partial(onnx_pass, open_session(file, threads=threads)) for file in files]
            self._time(f"cpu/{runtime}", candidates, makers, num_sentences=num_sentences)

    def _time(self, place: str, candidates: list[Candidate], makers: list[Any], *, num_sentences: int) -> None:
        """Time small batches, then large ones; the keys of the scores begin with ``place``."""
        measures: list[Callable[..., dict[str, float]]] = [latency, partial(throughput, num_sentences=num_sentences)]
        for which, (size, measure) in enumerate(zip(self.batch_sizes, measures, strict=True)):
            log.info("%s: %d models in turn, batches of %d, %d rounds", place, len(candidates), size, self.rounds)
            passes = [make(candidate.batches[which]) for make, candidate in zip(makers, candidates, strict=True)]
            seconds = seconds_in_turn(passes, warm_up=self.warm_up, rounds=self.rounds)
            for candidate, own in zip(candidates, seconds, strict=True):
                candidate.scores |= {f"{place}/{key}": value for key, value in measure(own).items()}
                candidate.seconds += float(own.sum())
                candidate.tokens += self.rounds * candidate.num_tokens

    def _time_whole(self, device: str, candidates: list[Candidate]) -> None:
        """Time one pass over all sentences, one at a time: the paper's measure."""
        log.info("%s: one pass over %d sentences, one at a time", device, len(candidates[0].whole))
        passes = [torch_pass(candidate.model, candidate.whole, device=device) for candidate in candidates]
        seconds = seconds_in_turn(passes, warm_up=self.warm_up, rounds=1)
        for candidate, own in zip(candidates, seconds, strict=True):
            candidate.scores[f"{device}/pass_seconds"] = float(own.sum())
            candidate.seconds += float(own.sum())
            candidate.tokens += sum(int(batch["attention_mask"].sum()) for batch in candidate.whole)

    def _result(self, candidate: Candidate, against: Sequence[Candidate], details: dict[str, Any]) -> Result:
        job, devices = candidate.job, self._devices()
        settings = {key: value for key, value in asdict(self).items() if key not in ("against", "hub", "data_dir")}
        settings |= {"batch_sizes": list(self.batch_sizes), "devices": devices, "data": self.data_dir or str(self.hub)}
        others = [other for other in against if other is not candidate]
        ratios = {other.job.name: times_faster(candidate.scores, other.scores) for other in others}
        processors = {device: processor(device) for device in devices}
        return Result(
            name=job.name,
            model=job.model,
            sha256=job.sha256,
            **described(candidate.model),
            task=self.name,
            kind="speed",
            seed=job.seed,
            settings=settings,
            scores=candidate.scores,
            score=None,
            details={"against": ratios, **details, **candidate.details, "processors": processors},
            cost=cost(seconds=candidate.seconds, tokens=candidate.tokens, device=devices[-1]),
        )


def file_size(model: str, *, num_params: int) -> tuple[float, str]:
    """Return the megabytes (1e6 bytes) of the weights in float32, and their source.

    A folder with float32 weights gives the size of its files; a hub id or another type, 4 bytes a parameter.
    """
    files = sorted(Path(model).glob("model*.safetensors"))
    if not files or not all(map(_is_float32, files)):
        return num_params * 4 / 1e6, "parameters x 4 bytes"
    return sum(file.stat().st_size for file in files) / 1e6, ", ".join(file.name for file in files)


def _is_float32(file: Path) -> bool:
    with safe_open(file, framework="pt") as weights:
        return all(weights.get_slice(key).get_dtype() == "F32" for key in weights.keys())  # noqa: SIM118 - no mapping


def encode(
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    batch_size: int,
    max_length: int,
) -> list[Batch]:
    """Tokenize sentences or pairs in order, and pad each batch to its longest: the model's inputs, (batch, length)."""
    if hasattr(model.config, "max_position_embeddings"):
        max_length = min(max_length, max_positions(model))
    batches: list[Batch] = []
    for start in range(0, len(sentences), batch_size):
        texts = [list(column) for column in zip(*sentences[start : start + batch_size], strict=True)]
        encoded = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append(inputs_of(model, encoded))
    return batches
