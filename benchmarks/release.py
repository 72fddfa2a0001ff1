"""Check a release: build the sdist and the wheel of HEAD, install each in an empty environment, and distil there.

Needs git, Python 3.11 or newer, and a package index; imports nothing that is installed: ``make release-check``.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
TOOLS = "build==1.6.1", "twine==7.0.0", "cffconvert==2.0.0"  # apart: cffconvert needs an old jsonschema
UNWANTED = re.compile(r"(^|/)(tests?|benchmarks|notebooks|outputs|__pycache__|\.[^/]*cache)/|\.pyc$|(^|/)conftest\.py$")
SMALL = (  # one step of four blocks, on one CPU
    "data=text",
    "data.corpus.paths=corpus.txt",
    "data.block_size=16",
    "data.global_batch_size=4",
    "data.micro_batch_size=4",
    "data.val_share=0.1",
    "data.max_val_blocks=4",
    "trainer=cpu",
    "trainer.max_steps=1",
)
TEACHER = (  # made from README, as no network may be asked for one
    "teacher=none",
    "objective=mlm",
    "tokenizer=wordpiece",
    "tokenizer.vocab_size=500",
    "student=new",
    "student.config={hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}",
)


def disagreements(folder: Path) -> list[str]:
    """Return what the versions in pyproject.toml, CITATION.cff and CHANGELOG.md of a folder have against each other."""
    version = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    cited = re.findall(r"^version: *(\S+)", (folder / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    listed = re.findall(r"^## *(\d\S*)", (folder / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[:1]
    found = {"CITATION.cff": cited, "the newest heading of CHANGELOG.md": listed}
    return [
        f"version={version} in pyproject.toml, but {' '.join(other) or 'none'} in {place}; set both to the same"
        for place, other in found.items()
        if other != [version]
    ]


def unwanted(wheel: Path) -> list[str]:
    """List the files of a wheel that belong to tests or caches, or lie outside of the package."""
    names = zipfile.ZipFile(wheel).namelist()
    return [name for name in names if UNWANTED.search(name) or not name.startswith(("distilkit/", "distilkit-"))]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the checkout on its path and without a network for models, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "DISTILKIT_CACHE": str(cwd / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}\nended with status {done.returncode}")
    return done.stdout


def empty_environment(folder: Path) -> Path:
    """Make a virtual environment, and return its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def smoke(python: Path, *, folder: Path, version: str) -> None:
    """Print the help, train a teacher and a student for a step each, and export, report and load the student."""
    folder.mkdir()
    (folder / "corpus.txt").write_text((CHECKOUT / "README.md").read_text("utf-8"), "utf-8")
    place = run(python, "-c", "import distilkit; print(distilkit.__version__, distilkit.__file__)", cwd=folder)
    assert place.startswith(f"{version} {python.parents[1]}"), place
    assert "teacher=" in run(python, "-m", "distilkit.train", "--help", cwd=folder)
    train = python, "-m", "distilkit.train", *SMALL
    run(*train, *TEACHER, "hydra.run.dir=teacher", cwd=folder)
    run(*train, "teacher=hf", "teacher.name=teacher/student", "hydra.run.dir=run", cwd=folder)
    run(python, "-m", "distilkit.export", "ckpt=run/checkpoints/last.ckpt", "out=student", cwd=folder)
    run(python, "-m", "distilkit.report", "runs=[teacher,run]", "out=report", cwd=folder)
    load = "from transformers import AutoModelForMaskedLM as M; print(M.from_pretrained('student').num_parameters())"
    assert int(run(python, "-c", load, cwd=folder)) > 0
    assert (folder / "report" / "report.html").is_file()


def main() -> None:
    """Run all checks, print a line for each, and exit with status 1 at the first that fails."""
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        source = place / "source"
        run("git", "archive", "--output", place / "head.tar", "HEAD", cwd=CHECKOUT)
        with tarfile.open(place / "head.tar") as archive:
            archive.extractall(source, filter="data")
        commit = run("git", "log", "-1", "--format=%h %s", cwd=CHECKOUT).strip()
        changed = run("git", "status", "--porcelain", cwd=CHECKOUT).splitlines()
        say(f"HEAD is {commit}" + (f"; {len(changed)} uncommitted files are left out" if changed else ""))
        if wrong := disagreements(source):
            sys.exit("\n".join(wrong))
        version = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]["version"]
        say(f"version {version} in pyproject.toml, CITATION.cff and CHANGELOG.md")

        tools = empty_environment(place / "tools")
        run(tools, "-m", "pip", "install", "--quiet", *TOOLS, cwd=place)
        say(run(tools.parent / "cffconvert", "--validate", "-i", source / "CITATION.cff", cwd=place).strip())
        run(tools, "-m", "build", "--outdir", place / "dist", source, cwd=place)
        wheel, sdist = sorted((place / "dist").iterdir(), key=lambda file: file.suffix, reverse=True)
        run(tools, "-m", "twine", "check", "--strict", wheel, sdist, cwd=place)
        say(f"{sdist.name} and {wheel.name}: twine check --strict passed")
        if found := unwanted(wheel):
            sys.exit(f"{wheel.name} holds files of tests or caches: {', '.join(found)}")
        say(f"{len(zipfile.ZipFile(wheel).namelist())} files in the wheel, none of tests or caches")

        for kind, built in {"wheel": wheel, "sdist": sdist}.items():
            python = empty_environment(place / kind / "environment")
            run(python, "-m", "pip", "install", "--quiet", "-c", source / "constraints.txt", built, cwd=place)
            run(python, "-m", "pip", "check", cwd=place)
            say(f"{built.name} installed in an empty environment")
            smoke(python, folder=place / kind / "elsewhere", version=version)
            say(f"{built.name}: help, teacher, student, export and report work in another folder")


if __name__ == "__main__":
    main()
