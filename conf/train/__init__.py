"""The Hydra configs of distilkit.train, distilkit.prepare and distilkit.export."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distilkit.errors import UserError
from distilkit.runs.sweeps import job_folder


def _unless_steps(epochs: int, *, _parent_: Any, _root_: Any) -> int:
    """Return a number of epochs for ``max_epochs``, or -1 where ``max_steps`` beside it or a budget ends the run."""
    return epochs if _parent_.max_steps == -1 and _root_.get("budget") is None else -1


def _summary(folder: str) -> dict[str, Any]:
    """Read the record of a finished run, which another run takes its end from."""
    file = Path(folder).expanduser() / "summary.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; its run has failed or is not finished, so run it again first")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _training_seconds(folder: str) -> float:
    """Return the seconds of training of a finished run, to which another run's ``budget`` is set."""
    seconds: float | None = _summary(folder).get("training_seconds")
    if not seconds:
        raise UserError(
            f"{folder}/summary.json has training_seconds={seconds}; give the folder of a run that has trained"
        )
    return seconds


def _lm_alone(*, _root_: Any) -> dict[str, float]:
    """Return the weights of the objective with the LM loss alone, which is the masked or causal one of the teacher."""
    objective, teacher = _root_.objective, _root_.teacher
    weights = {name: 0.0 for name in map(str, objective) if name.startswith("alpha_")}
    own = [name for name in ("alpha_mlm", "alpha_clm") if objective[name]]
    if not own:  # no weight tells which
        from distilkit.language_model import lm_of_name  # which takes seconds to import

        source = {name: teacher[name] for name in ("name", "revision", "trust_remote_code")}
        own = [f"alpha_{teacher.get('lm') or lm_of_name(**source)}"]
    return weights | {own[0]: 1.0}


def _equal_steps(folder: str, *, _root_: Any) -> dict[str, int]:
    """Return the end of a training that takes as many steps as the one in ``folder``, which a budget may have ended."""
    if _root_.budget is None:
        return {}  # the same settings
    return {"max_steps": _summary(folder)["optimizer_steps"], "max_epochs": -1}


def _same_layers(folder: str) -> dict[str, list[int]]:
    """Return the layers that the run in ``folder`` has chosen by measurement, so that they are not measured again."""
    found = _summary(folder) if (Path(folder) / "summary.json").is_file() else {}
    return {"layers": found["layers"]} if found.get("layer_choice") else {}


def _suggest(*, _root_: Any) -> DictConfig:
    """Return what the trial of this job sets."""
    from distilkit.runs.search import suggest  # only a search needs Optuna

    return suggest(_root_.optuna, seed=_root_.seed)


OmegaConf.register_new_resolver("unless_steps", _unless_steps, replace=True)
OmegaConf.register_new_resolver("training_seconds", _training_seconds, replace=True)
OmegaConf.register_new_resolver("lm_alone", _lm_alone, replace=True)
OmegaConf.register_new_resolver("equal_steps", _equal_steps, replace=True)
OmegaConf.register_new_resolver("same_layers", _same_layers, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("suggest", _suggest, replace=True)
