"""Would the tests notice a fault? Plants each one of tools/faults in a copy of the tree and runs its tests there.

    python -m tools.mutations [--only TEXT] [--fresh]

A fault is *killed* if its tests fail with it, while they pass without; it *survives* if they pass all the same, which
means that a test is missing. A snippet that no longer occurs exactly once in its file is *stale*: the fault has to be
written anew. The exit status is 1 unless every fault is killed.

Results are kept in build/mutations/results.json and used again as long as fault, file and tests are the same, so an
interrupted run continues where it was. After a full run the table in CONTRIBUTING.md is rewritten.

Why a list of our own: mutmut and cosmic-ray make thousands of small changes to Python files and run a whole suite for
each. Here a fault is a mistake that somebody could make, in C++ and Triton too, with the tests that are meant for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from tools.faults import FAULTS, Fault
from tools.tree import ROOT, copy_tree

FOLDER = ROOT / "build" / "mutations"
RESULTS, TREE = FOLDER / "results.json", FOLDER / "tree"
TABLE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
LIMIT = 900
"""Seconds for the tests of one fault; more means that the fault made them hang, which is noticed too."""


def prepare() -> None:
    """Copy the working tree with the compiled extension."""
    extensions = list(ROOT.glob("hvp_engine/_C*.so"))
    if not extensions:
        raise SystemExit("hvp_engine/_C*.so: expected a built extension; got none: run `make build`")
    copy_tree(TREE)
    for path in extensions:
        shutil.copy2(path, TREE / "hvp_engine")
    (TREE / "hvp_engine" / "kernels").symlink_to(Path("..") / "kernels")


def run_tests(tests: str, interpreted: bool) -> tuple[str, str]:
    """ "killed" with the first test that fails, "survived", or "broken" with the reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *shlex.split(tests)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    try:
        done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "killed", f"no end after {LIMIT} s"
    if done.returncode == 0:
        return "survived", ""
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.M)
    if done.returncode == 1 and failed:
        return "killed", failed[1]
    if done.returncode < 0:
        return "killed", f"the tests end by {signal.Signals(-done.returncode).name}"
    return "broken", (done.stdout + done.stderr)[-500:]


def build() -> str:
    """Build the extension of the copy; why that failed, if it did."""
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"HVP_ENGINE_CUDA": "OFF", "PATH": folder + os.pathsep + os.environ["PATH"]}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]


def plant(fault: Fault) -> tuple[str, str]:
    """The verdict about a fault; the copy is afterwards what it was."""
    path = TREE / fault.file
    text = path.read_text()
    if text.count(fault.original) != 1:
        return "stale", f"the snippet occurs {text.count(fault.original)} times"
    extensions = {lib: lib.read_bytes() for lib in TREE.glob("hvp_engine/_C*.so")} if fault.compiled else {}
    path.write_text(text.replace(fault.original, fault.faulty))
    try:
        if fault.compiled and (reason := build()):
            return "broken", reason
        return run_tests(fault.tests, fault.interpreted)
    finally:
        path.write_text(text)
        for lib, content in extensions.items():
            lib.write_bytes(content)


def key_of(fault: Fault) -> str:
    """A digest of what the verdict depends on most: the fault, its file and the files of its tests, as copied."""
    digest = hashlib.sha256(repr(fault).encode())
    files = [fault.file, *(word for word in shlex.split(fault.tests) if word.startswith("tests/"))]
    for name in files:
        path = TREE / name.split("::")[0]
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def table(results: dict[str, list[str]], faults: Sequence[Fault]) -> str:
    """The last results, for CONTRIBUTING.md."""
    found = [results[key_of(fault)] for fault in faults]
    killed = sum(verdict == "killed" for verdict, _ in found)
    lines = [f"{date.today()}: {killed} of {len(faults)} faults killed.", "", "| file | fault | first test to fail |"]
    lines += ["|---|---|---|"]
    for fault, (verdict, detail) in zip(faults, found, strict=True):
        test = detail.split("::")[-1].split("[")[0] if verdict == "killed" else f"**{verdict}**"
        lines.append(f"| `{fault.file}` | {fault.why} | `{test}` |")
    return "\n".join(lines)


def write_table(results: dict[str, list[str]]) -> None:
    text = TABLE.read_text()
    before, rest = text.split(BEGIN)
    TABLE.write_text(f"{before}{BEGIN}\n{table(results, FAULTS)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose file or description has this text")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.why}"]
    chosen.sort(key=lambda fault: fault.compiled)  # these last: their builds follow each other
    FOLDER.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[str]] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    prepare()
    sound: dict[tuple[str, bool], tuple[str, str]] = {}
    for fault in chosen:
        key = key_of(fault)
        if results.get(key, [""])[0] != "killed":
            selection = fault.tests, fault.interpreted
            if selection not in sound:
                sound[selection] = run_tests(*selection)
            verdict, detail = plant(fault)
            if sound[selection][0] != "survived":
                verdict, detail = "broken", f"without the fault too: {sound[selection][1]}"
            results[key] = [verdict, detail]
            RESULTS.write_text(json.dumps(results, indent=1))
        verdict, detail = results[key]
        print(f"{verdict:<9} {fault.file}: {fault.why}" + (f"\n          {detail}" if detail else ""), flush=True)
    if len(chosen) == len(FAULTS):
        write_table(results)
    left = [fault for fault in chosen if results[key_of(fault)][0] != "killed"]
    print(f"{len(chosen) - len(left)} of {len(chosen)} killed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
