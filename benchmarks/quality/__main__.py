"""Measure what students keep of a teacher at equal time: ``python -m benchmarks.quality teacher=... 'text=[...]'``."""

import signal
import sys
from collections.abc import Callable

from benchmarks.quality import curve, report, scoring, training
from benchmarks.quality.experiment import HERE, Experiment, prepare, read_settings
from distilkit.errors import UserError

STAGES: dict[str, Callable[[Experiment], object]] = {
    "speed": training.measure_speed,
    "tune": training.tune,
    "train": training.train,
    "tasks": scoring.score_tasks,
    "curve": curve.measure_curve,
    "report": report.report,
}


def main() -> None:
    """Run the stages that are asked for, and end with 1 at an error."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((HERE / "settings.yaml").read_text("utf-8") + "\n" + (HERE / "rows.yaml").read_text("utf-8"))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings = read_settings(sys.argv[1:])
        asked = list(STAGES) if settings.stage == ["all"] else settings.stage
        for stage in asked:
            if stage not in STAGES:
                raise UserError(f"stage={stage}, but it takes all or a list of {', '.join(STAGES)}")
        experiment = prepare(settings)
        for stage in STAGES:
            if stage in asked:
                STAGES[stage](experiment)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
