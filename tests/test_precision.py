"""Which precision ``auto`` takes on which device, and what is said of it."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import distilkit.precision
import distilkit.train
from distilkit.precision import choose_precision, emulation, measured_ratio
from jobs import QUIET, SMALL, call

Device = Callable[..., None]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let torch find a CPU with these units that is so many times as fast in bfloat16, or a GPU."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def choose(*units: str, ratio: float = math.nan, capability: tuple[int, int] | None = None) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
        monkeypatch.setattr(distilkit.precision, "measured_ratio", lambda: ratio)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        native = capability is not None and capability >= (8, 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)

    return choose


@pytest.mark.parametrize(
    ("found", "accelerator", "precision", "reason"),
    [
        ({"units": ["amx_bf16"], "ratio": 4.0}, "cpu", "bf16-mixed", "this CPU has AMX, and a layer .* is 4.0 times"),
        ({"units": ["avx512_bf16"], "ratio": 1.31}, "auto", "bf16-mixed", "avx512_bf16, and a layer .* 1.3 times"),
        ({"units": ["avx512_bf16"], "ratio": 1.1}, "cpu", "32-true", "avx512_bf16, but a layer .* only 1.1 times"),
        ({"units": ["avx2"], "ratio": 4.0}, "cpu", "32-true", "this CPU has neither AMX nor avx512_bf16"),
        ({"capability": (8, 0)}, "auto", "bf16-mixed", "A card has compute capability 8.0$"),
        ({"capability": (7, 5)}, "gpu", "32-true", "7.5, and bfloat16 needs 8.0; 16-mixed may be faster"),
        ({"capability": (9, 0), "units": ["avx2"]}, "cpu", "32-true", "neither AMX nor"),
        ({"units": ["amx_bf16"], "ratio": 4.0}, "tpu", "32-true", "was not tried on .* trainer.accelerator=tpu"),
    ],
)
def test_bfloat16_is_taken_where_the_device_multiplies_it_faster(
    found: dict[str, Any], accelerator: str, precision: str, reason: str, device: Device
) -> None:
    device(*found.get("units", ()), **{key: value for key, value in found.items() if key != "units"})
    chosen, why = choose_precision(accelerator=accelerator)
    assert chosen == precision
    assert re.search(reason, why), why


def test_processes_that_could_measure_different_speeds_take_float32(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device("amx_bf16", ratio=4.0)
    assert choose_precision(accelerator="cpu", alone=False)[0] == "32-true"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_precision(accelerator="cpu") == (
        "32-true",
        "this CPU has AMX, but several processes may measure different speeds",
    )


def test_a_resumed_run_keeps_its_precision_where_the_device_has_it(device: Device) -> None:
    device("amx_bf16", ratio=4.0)
    assert choose_precision(accelerator="cpu", before="32-true")[0] == "32-true"
    assert choose_precision(accelerator="cpu", before="16-mixed")[0] == "bf16-mixed"
    device("avx2")
    assert choose_precision(accelerator="cpu", before="bf16-mixed")[0] == "32-true"
    device(capability=(8, 6))
    assert choose_precision(accelerator="gpu", before="32-true")[0] == "32-true"


def test_bfloat16_without_units_is_said_to_be_slow(device: Device) -> None:
    device("avx2")
    assert emulation(torch.device("cpu")) is None  # of an unknown architecture
    device(capability=(7, 5))
    assert str(emulation(torch.device("cuda"))).startswith(
        "this GPU only emulates bfloat16, which is slow; set trainer"
    )
    device(capability=(8, 0))
    assert emulation(torch.device("cuda")) is None


@pytest.mark.parametrize(("units", "slow"), [({}, True), ({"avx512_bf16": True}, False)])
def test_a_processor_without_units_is_slow(units: dict[str, bool], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **units})
    assert (emulation(torch.device("cpu")) is not None) == slow


def test_this_machine_can_be_measured() -> None:
    threads = torch.get_num_threads()
    assert 0 < measured_ratio() < math.inf
    assert torch.get_num_threads() == threads


def test_a_busy_machine_measures_the_same_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(torch.nn.Linear):
        """Computes the same in both precisions, but waits in bfloat16, as if other processes had the core."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                time.sleep(0.3)
            with torch.autocast("cpu", enabled=False):
                return super().forward(inputs)

    monkeypatch.setattr(torch.nn, "Linear", Interrupted)
    assert measured_ratio.__wrapped__() > 0.5


def test_a_run_says_and_records_what_was_chosen_and_goes_on_with_it(
    text_file: Path, save_teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def choose(**given: Any) -> tuple[str, str]:
        asked.append(given)
        return "bf16-mixed", "it is faster here"

    monkeypatch.setattr(distilkit.train, "choose_precision", choose)
    small = [*SMALL, *QUIET, "trainer.precision=auto", "validate_first=false", f"cache_dir={tmp_path}/cache"]
    given = ["teacher=hf", f"teacher.name={save_teacher('bert')}", *small, f"data.corpus.paths={text_file}"]
    for steps, resume in ((1, "null"), (2, "last")):
        done = call(distilkit.train.main, *given, f"trainer.max_steps={steps}", f"ckpt_path={resume}", cwd=tmp_path)
        assert done.code == 0, done.err
        assert "trainer.precision=auto takes bf16-mixed: it is faster here" in done.out
    configs = [OmegaConf.load(file) for file in tmp_path.glob("outputs/distil/*/config.yaml")]
    assert [config.trainer.precision for config in configs] == ["bf16-mixed"] * 2
    assert [each["before"] for each in asked] == [None, "bf16-mixed"]
    assert asked[0]["alone"] and asked[0]["accelerator"] == "cpu"
