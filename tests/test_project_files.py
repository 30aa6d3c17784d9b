"""The files around the code: workflows, templates, CITATION.cff, and that the oldest Python can parse everything."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

from sdpo_kernels import __version__

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)


def parsed(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def matrix() -> list[dict[str, str]]:
    return parsed(GITHUB / "workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]


# ---- workflows ----


def test_each_workflow_calls_its_make_target():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert [path.stem for path in WORKFLOWS] == ["lint", "test", "wheel"]
    for path in WORKFLOWS:
        called = re.findall(r"^make ([a-z-]+)", "\n".join(step.get("run", "") for step in steps(parsed(path))), re.M)
        assert called == ([path.stem, "serve"] if path.stem == "test" else [path.stem])
        assert set(called) <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_well_formed(path):
    workflow = parsed(path)
    assert {"push", "pull_request"} <= set(workflow["on"])
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        assert job["timeout-minutes"] <= 120
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), "GitHub's own actions, pinned by major version"
    for expression in re.findall(r"\$\{\{ (.*?) \}\}", path.read_text(encoding="utf-8")):
        assert expression in {f"matrix.{name}" for entry in matrix() for name in entry}


def test_the_matrix_covers_every_python_and_torch():
    pythons, torches = {entry["python"] for entry in matrix()}, {entry["torch"] for entry in matrix()}
    assert pythons == {"3.10", "3.11", "3.12", "3.13", "3.14"} == set(PYTHONS)  # strings: 3.10 is no number
    assert {version.rpartition(".")[0] for version in torches} == {"2.10", "2.11", "2.12", "2.13"}
    oldest = min(torches, key=lambda version: [int(part) for part in version.split(".")])
    assert f'"torch>={oldest.rpartition(".")[0]}"' in PYPROJECT
    assert f'requires-python = ">={PYTHONS[0]}"' in PYPROJECT
    entries = [tuple(sorted(entry.items())) for entry in matrix()]
    assert len(set(entries)) == len(entries)


def test_make_takes_another_torch():
    """What the workflow passes is a variable of the Makefile, whose default is the pinned version."""
    commands = [step["run"] for step in steps(parsed(GITHUB / "workflows/test.yml")) if "make" in step.get("run", "")]
    assert len(commands) == 2
    for name in re.findall(r"([A-Z]+)=", " ".join(commands)):
        assert re.search(rf"^{name} \?= \$\(shell sed -n 's/\^{name.lower()}==//p' constraints.txt\)$", MAKEFILE, re.M)
    pins = re.findall(r"^(torch|triton)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert sorted(pins) == ["torch", "triton"]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_package_once_for_each_python(python):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    serving = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert sorted(pin.name for pin in serving) == sorted({pin.name for pin in pins})
    wanted = dict(re.findall(r'"(\w[\w-]*)(>=[\d.]+)"', PYPROJECT))
    for pin in serving:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert SpecifierSet(wanted.get(pin.name, "")).contains(exact.version), pin


def test_the_oldest_stack_is_one_that_is_promised():
    """Of transformers it is the very oldest; what make oldest installs is read from both files."""
    lines = (ROOT / "tests/oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin.specifier for line in lines if not line.startswith("#") for pin in [Requirement(line)]}
    assert pins.keys() == {"torch", "triton", "transformers", "numpy"}
    (training,) = re.findall(r'^train = \[\n    "transformers>=([\d.]+)"', PYPROJECT, re.M)
    assert str(pins["transformers"]) == f"=={training}.0"
    (torch,) = re.findall(r'"torch(>=[\d.]+)"', PYPROJECT)
    assert SpecifierSet(torch).contains(str(pins["torch"]).removeprefix("=="))
    (python,) = re.findall(r"^PYTHON_OLDEST \?= python([\d.]+)$", MAKEFILE, re.M)
    assert python in PYTHONS


# ---- Python 3.10 ----


def test_everything_is_python_3_10():
    """Its grammar; that nothing of a newer standard library is used in the package is mypy's to say."""
    oldest = (3, int(PYTHONS[0].partition(".")[2]))
    paths = [ROOT / "setup.py"]
    for folder in ("sdpo_kernels", "tests", "benchmarks", "examples", "docs"):
        paths += (ROOT / folder).rglob("*.py")
    assert len(paths) > 150
    for path in paths:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=oldest)
    assert f'python_version = "{PYTHONS[0]}"' in PYPROJECT
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in PYPROJECT


# ---- templates and citation ----


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = parsed(path)
    assert form["name"]
    assert form["description"]
    kinds = [field["type"] for field in form["body"]]
    assert set(kinds) <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    for field in fields:
        assert ("options" in field["attributes"]) == (field["type"] in {"dropdown", "checkboxes"})


def test_both_forms_are_there_and_nothing_else_is_offered():
    assert [path.stem for path in FORMS] == ["bug", "feature"]
    assert parsed(GITHUB / "ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}


def test_the_bug_form_asks_for_sdpo_info():
    """tests/test_info.py runs the command."""
    (versions,) = [
        field for field in parsed(GITHUB / "ISSUE_TEMPLATE/bug.yml")["body"] if field.get("id") == "versions"
    ]
    assert "`sdpo info`" in versions["attributes"]["description"]
    assert "`python -m sdpo_kernels info`" in versions["attributes"]["description"]
    assert versions["validations"] == {"required": True}


def test_the_pull_request_template_asks_what_contributing_does():
    template = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for text in (template, contributing):
        for word in ("make test", "make lint", "CHANGELOG.md", "benchmarks/results/notes.md", "float64", "Prediction"):
            assert word in text


def test_commands_of_contributing_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"make ([a-z-]+)", text)
    assert set(targets) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    assert modules
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_citation():
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= citation.keys()
    assert citation["authors"] == [{"name": "the sdpo_kernels contributors"}]
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == "https://arxiv.org/abs/2403.19270"
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    (repository,) = re.findall(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    assert citation["repository-code"] == repository


# ---- pytest ----


@pytest.mark.xdist_group("kept together")
def test_xdist_keeps_groups_of_tests_together(request):
    """xdist 3.8 under pytest 9.2 forgets them without a word, and builds then disturb each other."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("needs --dist loadgroup")
    assert request.node.nodeid.endswith("@kept together")
