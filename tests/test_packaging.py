"""The package as an installer leaves it: what is in it, what it needs, and that it runs."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch
import yaml

import kvsieve
from kvsieve import UserError, ops

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------- without Triton
def test_the_triton_ops_name_their_extra_where_triton_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kvsieve.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(ops, "_loaded", {"reference": ops.reference})
    monkeypatch.setattr(ops, "_DEFAULT", None)
    with pytest.raises(
        UserError, match=r"need triton: pip install 'kvsieve\[triton\]', or choose 'reference'"
    ):
        ops.implementation(torch.device("cuda"))


@pytest.mark.slow
def test_everything_but_the_kernels_imports_without_triton():
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import kvsieve, kvsieve_policies
for package in (kvsieve, kvsieve_policies):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith("kvsieve.ops.triton") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
    assert "kvsieve.hf.models" in run(sys.executable, "-c", code, cwd=ROOT).split()


# ---------------------------------------------------------------- one set of commands
def makefile_targets():
    """Each target of the Makefile with its prerequisites."""
    rules = re.findall(r"^(\w+):(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target: rest.split() for target, rest in rules}


def test_the_workflow_runs_the_two_commands_of_the_readme():
    shown = re.search(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands = [line.partition("#")[0].strip("$ ") for line in shown.splitlines()]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps == commands == ["make demo", "make test"]


def test_the_workflow_and_the_metadata_agree_on_the_oldest_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={versions[0]}"
    assert {f"Programming Language :: Python :: {version}" for version in versions} <= {
        *project["classifiers"]
    }


def test_pre_commit_runs_what_make_test_runs_before_its_tests():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == [f"make --silent {target}" for target in makefile_targets()["test"] if target != "unit"]


# ---------------------------------------------------------------- built and installed
@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a command of an environment that holds the wheel; only its dependencies come from this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", built[1])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Behind the environment's own packages; .pth files of the other folder (editable installs) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def command(*words, **options):
        program = python if words[0] == "python" else python.with_name(words[0])
        return run(program, *words[1:], cwd=home, env=environment | {"COLUMNS": "120"}, **options)

    assert str(home) in command("python", "-c", "import kvsieve; print(kvsieve.__file__)")
    return command


@pytest.mark.slow
def test_the_sdist_holds_all_that_git_tracks(built):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} - held


@pytest.mark.slow
def test_the_wheel_holds_both_packages_typed_with_the_reference_model_and_the_licence(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        metadata = message_from_string(archive.read(_info(names) + "METADATA").decode())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kvsieve", "kvsieve_policies", _info(names).rstrip("/")}
    assert {"kvsieve/py.typed", "kvsieve_policies/py.typed", _info(names) + "licenses/LICENSE"} <= names
    for file in (ROOT / "framework" / "kvsieve" / "reference_model" / "model").iterdir():
        assert f"kvsieve/reference_model/model/{file.name}" in names
    assert metadata["Version"] == kvsieve.__version__
    assert not [
        need for need in metadata.get_all("Requires-Dist") if "triton" in need and "extra" not in need
    ]


@pytest.mark.slow
def test_no_link_of_the_readme_is_relative_on_an_index(built):
    with zipfile.ZipFile(built[1]) as archive:
        readme = archive.read(_info(archive.namelist()) + "METADATA").decode()
    targets = [rest.partition(")")[0] for rest in readme.split("](")[1:]]
    assert len(targets) > 10
    assert not [target for target in targets if not target.startswith("https://")]
    assert "raw.githubusercontent.com/kvsieve/kvsieve/main/docs/images/quickstart.png" in readme


def _info(names):
    return next(name for name in names if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")


@pytest.mark.slow
def test_the_installed_command_says_its_version_and_lists_the_policies(installed):
    assert kvsieve.__version__ in installed("kvsieve", "--version")
    listed = installed("kvsieve", "policies")
    assert f"kvsieve {kvsieve.__version__}" in listed
    for name in ("dense", "sparq", "h2o", "local_window", "dense_layers"):
        assert name in listed


@pytest.mark.slow
def test_the_installed_package_generates_with_the_model_inside(installed):
    fact = "The secret number of Lisbon is"
    prompt = f"import os\n{fact} 418027.\nimport sys\n{fact}"
    assert "418027" in installed("kvsieve", "generate", "--policy", "sparq", "--max-new-tokens", "8", prompt)
