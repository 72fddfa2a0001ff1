"""Trackio as a Lightning logger: experiments on this machine, shown by ``trackio show``."""

import contextlib
import io
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from distilkit.errors import UserError

log = logging.getLogger(__name__)


class TrackioLogger(Logger):
    """Log to Trackio, into ``TRACKIO_DIR`` or its folder in the Hugging Face cache, or to a Space of the hub.

    A run is named by ``name`` and the folder ``save_dir``, so that a resume in this folder goes on with it. The runs of a
    sweep share a ``group``.
    """

    def __init__(
        self, *, save_dir: str, project: str, name: str, group: str | None = None, space_id: str | None = None
    ) -> None:
        """Check that Trackio is installed; nothing is written before the first metric."""
        super().__init__()
        if find_spec("trackio") is None:
            raise UserError("logger=trackio needs Trackio; install it with pip install 'distilkit[trackio]'")
        self.settings = {"project": project, "group": group, "space_id": space_id}
        self.run_name = f"{name}-{Path(save_dir).name}"
        self.config: dict[str, Any] = {}
        self.run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return str(self.settings["project"])

    @property
    def version(self) -> str:
        """The run's name in the project."""
        return self.run_name

    @property
    def experiment(self) -> Any:
        """The run of Trackio, which begins here."""
        if self.run is None:
            import trackio

            said = io.StringIO()  # a page of instructions
            given: dict[str, Any] = {**self.settings, "name": self.run_name, "config": self.config}
            with contextlib.redirect_stdout(said):
                self.run = trackio.init(**given, resume="allow", embed=False, auto_log_cpu=False)
            log.info("Trackio logs project %s, run %s; show it with: trackio show", self.name, self.run_name)
        return self.run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the config for the run, which begins with the first metric."""
        given = vars(params) if isinstance(params, Namespace) else dict(params)
        self.config |= json.loads(json.dumps(given, default=str))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_text(self, key: str, text: str, *, step: int) -> None:
        """Log Markdown of a step."""
        import trackio

        self.experiment.log({key: trackio.Markdown(text)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory."""
        if self.run is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                self.run.finish()
            self.run = None
