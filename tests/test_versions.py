"""The tool that tries every torch and Python: what it makes of a report, and what it does again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools import versions

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_bad[x]"><failure message="no">...</failure></testcase>
<testcase classname="" name="tests.test_b"><error message="collection failure">...</error></testcase>
<testcase classname="tests.test_a" name="test_gpu"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_a" name="test_old"><skipped message="torch 2.11 has no x (issue 1)"/></testcase>
<testcase classname="tests.test_a" name="test_older"><skipped message="torch 2.11 has no x (issue 1)"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted() -> None:
    result = versions.result_of(REPORT, {"torch": "2.11.0"})
    assert (result.passed, result.skipped) == (1, 3)
    assert result.failed == ["test_a::test_bad[x]", "tests.test_b"]
    assert result.differences == ["torch 2.11 has no x (issue 1)"]


@pytest.mark.parametrize("report", ["", "<testsuites><testsuite/></testsuites>"])
def test_a_run_without_tests_has_failed(report: str) -> None:
    assert versions.result_of(report, {}).failed == ["the run itself"]


def test_everything_named_exists() -> None:
    for where in (where for files in versions.TESTS.values() for where in files):
        file, _, test = where.partition("::")
        assert not test or f"def {test}(" in (versions.ROOT / file).read_text()
        assert (versions.ROOT / file).exists()


def test_pairs_with_a_result_are_left_out_and_the_page_names_those_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def install(torch: str, python: str, log: Path) -> str:
        tried.append((torch, python))
        if python == "3.10" and len(tried) < 3:
            raise versions.Unavailable("no python3.10 on PATH")
        versions.ENVIRONMENT.mkdir()
        return torch

    def run_tests(torch: str, log: Path) -> versions.Result:
        failed = ["test_a::test_b"] if torch == "2.11.0" else []
        return versions.Result({"torch": torch, "python": "3"}, 5, failed, 1, [f"torch {torch} has no x"], "2026-01-01")

    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    for name in ("results.json", "environment", "page.md"):
        attribute = {"results.json": "RESULTS", "environment": "ENVIRONMENT", "page.md": "PAGE"}[name]
        monkeypatch.setattr(versions, attribute, tmp_path / name)
    monkeypatch.setattr(versions, "PAIRS", (("2.11.0", "3.11"), ("2.13.0", "3.10")))
    monkeypatch.setattr(versions, "install", install)
    monkeypatch.setattr(versions, "run_tests", run_tests)

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["versions", *arguments])
        return versions.main()

    assert call() == 1 and not versions.ENVIRONMENT.exists()
    assert "| 2.13.0 | 3.10 | - | - | not run yet | | | |" in versions.PAGE.read_text()
    assert "torch 2.13.0, Python 3.10: could not be tried: no python3.10 on PATH" in capsys.readouterr().out
    assert list(json.loads(versions.RESULTS.read_text())) == ["torch 2.11.0, Python 3.11"]
    assert call("--only", "2.13") == 0
    assert call() == 1  # the first has a failed test
    assert tried == [("2.11.0", "3.11"), ("2.13.0", "3.10"), ("2.13.0", "3.10")]
    text = versions.PAGE.read_text()
    assert re.findall(r"^\| (2\.1.*)$", text, re.M) == [
        "2.11.0 | 3 | - | - | 5 | 1 | 1 | 2026-01-01 |",
        "2.13.0 | 3 | - | - | 5 | 0 | 1 | 2026-01-01 |",
    ]
    assert "- torch 2.11.0 has no x\n- torch 2.13.0 has no x\n" in text
    assert "Failed:\n\n- torch 2.11.0, Python 3.11: `test_a::test_b`\n" in text
    assert call("--only", "2.11", "--fresh") == 1
    assert tried[3:] == [("2.11.0", "3.11")]
    assert not list(tmp_path.glob("*.part"))
    assert call("--only", "no such pair") == 1


def test_the_page_is_what_the_committed_results_say() -> None:
    results = {name: versions.Result(**fields) for name, fields in json.loads(versions.RESULTS.read_text()).items()}
    assert versions.page(results) == versions.PAGE.read_text()
    assert set(results) <= {versions.key(*pair) for pair in versions.PAIRS}


def test_the_package_names_the_pythons_whose_tests_passed() -> None:
    results = [versions.Result(**fields) for fields in json.loads(versions.RESULTS.read_text()).values()]
    passed = {".".join(result.versions["python"].split(".")[:2]) for result in results if not result.failed}
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (versions.ROOT / "pyproject.toml").read_text())
    assert named == sorted(passed)
