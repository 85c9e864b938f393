"""Does the package work with the torch and Python versions that it names? Makes each environment, runs tests there.

    python -m tools.versions [--only TEXT] [--fresh]

For each pair of versions: a virtual environment with that torch and the package built from a copy of the tree, the
tests named below, and the environment is deleted, since it takes up to 6 GB. pip's own settings (such as PIP_INDEX_URL)
decide where packages come from; interpreters are looked for on PATH as `python3.12` and so on.

Results are kept in bench/results/versions.json, which is committed: a pair that has one is left out the next time,
unless `--fresh` asks for it, and a run of some pairs loses nothing of the others. docs/versions.md is written anew from
what is there, and names the pairs that have no result. The exit status is 1 if a test failed or a pair could not be
tried.

A test that depends on the version of torch is skipped for a reason that begins with "torch"; the table repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from tools.tree import ROOT, copy_tree

FOLDER = ROOT / "build" / "versions"
TREE, ENVIRONMENT = FOLDER / "tree", FOLDER / "environment"
RESULTS = ROOT / "bench" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

PAIRS = (
    *((torch, "3.11") for torch in ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")),
    *(("2.13.0", python) for python in ("3.10", "3.12", "3.13")),
)
"""Versions of torch and of Python: every torch on one Python, and every Python on one torch."""

ENGINES = ("eager", "linearized", "compiled", "finite_difference", "cudagraph", "auto", "side_by_side")

TESTS = {
    "private names of torch, and what guards expect of it": [
        "tests/test_torch_compat.py",
        "tests/test_torch_compat_nodes.py",
        "tests/test_torch_compat_traces.py",
    ],
    "products recorded from autograd's graph": [
        f"tests/test_recorded_{name}.py" for name in ("models", "look_alikes", "states", "places", "unseen", "library")
    ],
    "the registered ops: opcheck and torch.compile; Triton": ["tests/test_ops_registered.py", "tests/test_kernels.py"],
    "every engine on several networks": [f"tests/test_engines_{name}.py" for name in ENGINES],
    "traces and their rewrites": [
        "tests/test_abstract_tensor.py",
        *(f"tests/test_trace_{name}.py" for name in ("graph_recorder", "functionalize", "rewriting", "regions")),
    ],
    "35 models against plain double backward": ["tests/test_hard_models.py", "tests/test_differentiable_kernels.py"],
    "solvers": [f"tests/test_solvers_{name}.py" for name in ("base", "exact", "minres", "nystrom")],
    "hypergradients in every style": ["tests/test_implicit.py", "tests/test_products.py"],
    "Algorithm 1, stopped and resumed": [
        "tests/test_tuner.py",
        "tests/test_resume.py::test_stopped_and_continued_at_every_step",
        "tests/test_resume.py::test_killed_in_the_middle_of_a_step",
    ],
    "backends, and `doctor`": ["tests/test_backend.py", "tests/test_doctor.py"],
}
"""What is tested, and where: about eight minutes of one core."""

CHANGES = {
    "2.14": "The double backward of evaluation-mode BatchNorm has `pow_` in it. Traces find the functional form of any "
    "in-place operator by its schema.",
    "2.15": "The derivative of `clamp` at a bound is 0; it was 1 (pytorch pull request 191142). A loss with values at "
    "the bound has another gradient.",
}
"""What torch changed that a hypergradient can notice, by the version, and what becomes of it."""

LIMIT = 3600
"""Seconds for the tests of one pair."""


class Unavailable(Exception):
    """A pair cannot be tried here, for the reason in its text."""


@dataclass(frozen=True)
class Result:
    """What the tests found in one environment.

    Attributes:
        versions: of Python and of the packages that matter.
        passed: how many tests passed.
        failed: the names of those that did not.
        skipped: how many were skipped.
        differences: why tests were skipped that depend on the version of torch.
        date: when they ran.
    """

    versions: dict[str, str]
    passed: int
    failed: list[str]
    skipped: int
    differences: list[str]
    date: str


def write(path: Path, text: str) -> None:
    """Replace a file at once: after an interruption it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def interpreter(python: str) -> str:
    """The program that runs this version of Python."""
    found = shutil.which(f"python{python}")
    works = found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0  # pyenv's shims may not
    if not works:
        raise Unavailable(f"no python{python} on PATH")
    return str(found)


def install(torch: str, python: str, log: Path) -> str:
    """Make the environment; its interpreter."""
    copy_tree(TREE)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([interpreter(python), "-m", "venv", str(ENVIRONMENT)], check=True)
    executable = str(ENVIRONMENT / "bin" / "python")
    packages = [f"torch=={torch}", "--editable", f"{TREE}[test,triton]"]
    command = [executable, "-m", "pip", "install", "--progress-bar=off", "--no-compile", *packages]
    with log.open("w") as output:
        environment = os.environ | {"HVP_ENGINE_CUDA": "OFF"}
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise Unavailable(next((x for x in log.read_text().splitlines()[::-1] if x.startswith("ERROR")), str(log)))
    return executable


def run_tests(executable: str, log: Path) -> Result:
    """Run the tests in the environment of `executable`."""
    report = FOLDER / "report.xml"
    report.unlink(missing_ok=True)
    command = [executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [where for files in TESTS.values() for where in files]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("a") as output:
        try:
            subprocess.run(
                command, cwd=TREE, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nno end after {LIMIT} s\n")
    return result_of(report.read_text() if report.exists() else "", versions(executable))


def versions(executable: str) -> dict[str, str]:
    """Python's version and those of the packages that matter, as they import in the environment."""
    code = """
import importlib, json, platform
found = {"python": platform.python_version()}
for name in ("torch", "triton", "numpy"):
    try:
        found[name] = importlib.import_module(name).__version__
    except ImportError:
        pass
print(json.dumps(found))
"""
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def result_of(report: str, versions: dict[str, str]) -> Result:
    """What a JUnit report of pytest says; without one, the run itself has failed.

    >>> case = '<testcase classname="tests.test_a" name="test_b"><skipped message="torch 2.11: no x"/></testcase>'
    >>> result_of(f"<testsuites><testsuite>{case}</testsuite></testsuites>", {}).differences
    ['torch 2.11: no x']
    """
    failed, differences, skipped, passed = [], [], 0, 0
    for case in ElementTree.fromstring(report).iter("testcase") if report else ():
        reason = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}".removeprefix("::"))
        elif reason is None:
            passed += 1
        else:
            skipped += 1
            differences += [reason.get("message", "")] if reason.get("message", "").startswith("torch") else []
    if not passed:
        failed.append("the run itself")
    return Result(versions, passed, failed, skipped, sorted(set(differences)), str(date.today()))


PAGE_TEXT = """\
# Versions

`make versions` makes each of these environments from what pip finds, runs there the tests named below, and writes this
page.

| torch | Python | Triton | NumPy | passed | failed | skipped | date |
|---|---|---|---|---|---|---|---|
{rows}

{failed}

Skipped, beside what does not apply, because of the version of torch:

{differences}

What else torch has changed:

{changes}

The tests:

{tests}
"""


def page(results: Mapping[str, Result]) -> str:
    """docs/versions.md: a row for each pair, what failed, and what differs between versions."""
    found = {name: results[name] for name in (key(*pair) for pair in PAIRS) if name in results}
    rows = []
    for pair in PAIRS:
        result = results.get(key(*pair))
        if result is None:
            rows.append(f"| {pair[0]} | {pair[1]} | - | - | not run yet | | | |")
            continue
        versions = [result.versions.get(name, "-") for name in ("torch", "python", "triton", "numpy")]
        counts = [str(count) for count in (result.passed, len(result.failed), result.skipped)]
        rows.append(f"| {' | '.join([*versions, *counts, result.date])} |")
    failed = [f"- {name}: `{test}`" for name, result in found.items() for test in result.failed]
    differences = sorted({f"- {reason}" for result in found.values() for reason in result.differences})
    return PAGE_TEXT.format(
        rows="\n".join(rows),
        failed="\n".join(["Failed:", "", *failed] if failed else ["None failed."]),
        differences="\n".join(differences),
        changes="\n".join(f"- {version}: {what}" for version, what in CHANGES.items()),
        tests="\n".join(f"- {what}: {', '.join(f'`{file}`' for file in files)}" for what, files in TESTS.items()),
    )


def key(torch: str, python: str) -> str:
    """What a pair is called.

    >>> key("2.13.0", "3.11")
    'torch 2.13.0, Python 3.11'
    """
    return f"torch {torch}, Python {python}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='pairs whose name has this text: "torch 2.15", "3.10"'
    )
    parser.add_argument("--fresh", action="store_true", help="try again what has a result already")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {name: Result(**fields) for name, fields in kept.items()}
    chosen = [pair for pair in PAIRS if options.only in key(*pair)]
    complete = bool(chosen)
    for pair in chosen:
        name = key(*pair)
        if options.fresh or name not in results:
            log = FOLDER / f"torch-{pair[0]}-python-{pair[1]}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            try:
                results[name] = run_tests(install(*pair, log), log)
            except Unavailable as reason:
                print(f"{name}: could not be tried: {reason}", flush=True)
                complete = False
                continue
            finally:
                shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            write(RESULTS, json.dumps({name: asdict(result) for name, result in results.items()}, indent=1) + "\n")
        result = results[name]
        print(f"{name}: {result.passed} passed, {len(result.failed)} failed, {result.skipped} skipped", flush=True)
        for test in result.failed:
            print(f"  {test}")
    if results:
        write(PAGE, page(results))
    return 0 if complete and not any(results[key(*pair)].failed for pair in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
