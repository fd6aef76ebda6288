"""What a user installs: the source distribution, and its wheel in environments with more and less around them.

Nothing is downloaded. An environment is a venv whose packages are links to those of this Python, some left out.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("triton_kernels", "reference", "bench")  # folders that live beside hybrid_ops and ship inside it
NOT_SOURCES = shutil.ignore_patterns(
    *(".*", "build", "dist", "__pycache__", "*.so", "*.egg-info", "*.html.tmp", "tests", "docs")
)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout")


def run(*command, cwd, expect=0, environment=None, prefix=()):
    """Output of a command; a failure shows it."""
    result = subprocess.run(
        [*prefix, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"HYBRID_OPS_CUDA": "0", "PYTHONPATH": "", "COLUMNS": "200"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == expect, f"{command} ended with {result.returncode}:\n{result.stdout}"
    return result.stdout


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what is in the checkout, links as links, so that no build leaves anything there."""
    copy = tmp_path_factory.mktemp("sources") / "hybrid-ops"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCES)
    (copy / "README.md").touch()
    return copy


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    pytest.importorskip("build", reason="pip install 'hybrid-ops[test]'")
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ".", cwd=sources)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, as a stranger's pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


def environment(folder, wheel, without=()):
    """A Python that has the wheel and, of this one's packages, all but `without`."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    hidden = (*without, "hybrid_ops", "__editable__", "_virtualenv", "distutils-precedence")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(hidden):
            (packages / entry.name).symlink_to(entry)
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    empty = folder / "empty"
    empty.mkdir()
    return python, empty


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("installed"), wheel)


def test_sdist(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()], "a link in an archive dangles elsewhere"
    names = {m.name.partition("/")[2] for m in members if m.isfile()}
    csrc = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    examples = {str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*.py")}
    assert csrc | examples <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "hybrid_ops/_env.py"} <= names
    for folder in LINKED:
        modules = {f"hybrid_ops/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
        assert modules
        assert modules <= names


def test_wheel(wheel):
    assert wheel.name.endswith("-py3-none-any.whl"), "without the extension one wheel serves every Python"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hybrid_ops"}
    expected = {
        str(p.relative_to(ROOT))
        for package in (ROOT / "hybrid_ops", *((ROOT / "hybrid_ops" / folder) for folder in LINKED))
        for p in package.rglob("*")
        if p.is_file() and p.suffix in (".py", ".html", ".json", ".typed")
    }
    assert expected <= set(names), sorted(expected - set(names))


def test_one_name_is_installed(installed):
    python, empty = installed
    code = "import hybrid_ops, importlib.util as u; print([n for n in %r if u.find_spec(n)], hybrid_ops.__file__)"
    printed = run(python, "-c", code % (("setup", "csrc", "tests", *LINKED),), cwd=empty)
    assert printed.startswith(f"[] {python.parent.parent}/"), printed


def test_info(installed):
    python, empty = installed
    printed = run(python.parent / "hybrid-ops", "info", cwd=empty)
    assert "hybrid-ops" in printed
    assert "not built" in printed
    assert "pip install" in printed, "info says how to get what is missing"


def test_check(installed):
    python, empty = installed
    printed = run(python.parent / "hybrid-ops", "check", cwd=empty)
    assert "causal_conv1d" in printed
    assert "within their budget" in printed


def test_bench(installed):
    python, empty = installed
    files = ("--json", "figures.json", "--html", "report.html")
    printed = run(python.parent / "hybrid-ops", "bench", "conv1d", *files, cwd=empty)
    assert "conv1d_fwd" in printed
    assert (empty / "figures.json").exists()
    assert "conv1d_fwd" in (empty / "report.html").read_text()


def test_a_missing_package_is_named(wheel, tmp_path):
    """Without Triton and cuda-python the CPU works, and info says what to install for the rest."""
    python, empty = environment(tmp_path, wheel, without=("triton", "cuda", "nvidia"))
    printed = run(python.parent / "hybrid-ops", "info", cwd=empty)
    assert "pip install triton" in printed
    code = "import torch, hybrid_ops as h; print(h.rms_norm(torch.ones(2, 8), torch.ones(8)).sum().item())"
    assert float(run(python, "-c", code, cwd=empty)) == pytest.approx(16, rel=1e-4)


def test_installs_where_the_extension_cannot_be_built(sdist, tmp_path):
    """HYBRID_OPS_CUDA=1 without nvcc: a wheel all the same, and one line that says why and how."""
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = run(
        *(*PIP, "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path / "wheels", sdist),
        cwd=empty,
        environment={"HYBRID_OPS_CUDA": "1", "CXX": "no-such-compiler"},
    )
    (line,) = {line.strip() for line in printed.splitlines() if "installing without the CUDA extension" in line}
    assert "apt-get install g++" in line or "pip install 'cuda-toolkit[nvcc,cccl]'" in line
    (archive,) = (tmp_path / "wheels").iterdir()
    assert not [name for name in zipfile.ZipFile(archive).namelist() if name.endswith(".so")]


def test_without_python_headers_and_nvcc(sdist, tmp_path):
    """On a machine with neither: it installs, and the CPU paths work. Both are hidden under empty folders."""
    unshare = shutil.which("unshare")
    include = Path(sysconfig.get_paths()["include"])
    hide = [p for p in (include, *Path("/usr/local").glob("cuda*")) if p.is_dir() and not p.is_symlink()]
    mounts = "".join(f"mount -t tmpfs none '{p}' && " for p in hide)
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", f"{mounts} true"], check=False).returncode:
        pytest.skip("this sandbox does not allow unshare --map-root-user --mount")
    hidden = (unshare, "-rm", "sh", "-c", f'{mounts} exec "$@"', "sh")
    wheels = tmp_path / "wheels"
    command = (*PIP, "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation", "-w", wheels, sdist)
    printed = run(*command, cwd=tmp_path, environment={"HYBRID_OPS_CUDA": "1"}, prefix=hidden)
    (line,) = {line.strip() for line in printed.splitlines() if "installing without the CUDA extension" in line}
    assert "is missing: " in line
    (archive,) = wheels.iterdir()
    python, empty = environment(tmp_path, archive)
    printed = run(python.parent / "hybrid-ops", "bench", "norm", cwd=empty, prefix=hidden)
    assert "norm_fwd" in printed
    printed = run(python, "-c", "import sysconfig, os; print(os.listdir(sysconfig.get_paths()['include']))", cwd=empty,
                  prefix=hidden)  # fmt: skip
    assert printed.strip() == "[]", "Python.h was not hidden"
