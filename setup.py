"""The CUDA build. `pip install .` needs neither torch nor CUDA, and never dies: without the extension the Triton and
CPU paths are installed, and one line says why. What is compiled is named by the hash of everything that went into it,
so an object is compiled once, whatever becomes of paths and times. See docs/build.md.
"""

import functools
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "cuda"
CUTLASS = "nvidia-cutlass==4.2.0"  # headers only, at build time only
ARCHITECTURES = {"sm90": ["90a"], "sm100": ["100a"], None: ["90", "100"]}  # by the suffix of a file's name
GB_PER_JOB = 5  # what CUTLASS's larger kernels take to compile

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-warn-spills"),
]

environment = runpy.run_path(str(ROOT / "hybrid_ops" / "_env.py"))


class CannotBuild(Exception):
    """Why the extension cannot be built here, and what to do about it."""


def wanted() -> bool:
    """HYBRID_OPS_CUDA decides where it is set; otherwise the extension is built where nvcc and a GPU are visible."""
    asked = environment["build_cuda"]()
    if asked is not None:
        return asked == "1"
    return find_nvcc() is not None and gpu_visible()


def gpu_visible() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and b"GPU " in subprocess.run([smi, "-L"], capture_output=True, check=False).stdout


@functools.cache
def find_nvcc() -> str | None:
    """From CUDA_HOME, else from the pip wheel beside this Python, else from PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.path.isfile(nvcc := os.path.join(os.environ.get(variable, ""), "bin", "nvcc")):
            return nvcc
    try:
        from cuda import pathfinder

        if (nvcc := pathfinder.find_nvidia_binary_utility("nvcc")) is not None:
            return nvcc
    except ImportError:
        pass
    return shutil.which("nvcc")


def cutlass_include() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        include = Path(spec.origin).parent / "source" / "include"
        if (include / "cutlass" / "cutlass.h").exists():
            return include
    raise CannotBuild(f"the CUTLASS headers are missing: pip install --no-deps {CUTLASS}")


def architectures(source: Path) -> list[str]:
    """`x_sm90.cu` is compiled for sm_90a only, `x_sm100.cu` for sm_100a only, `x.cu` for both families."""
    match = re.fullmatch(r".*_(sm\d+)", source.stem)
    return ARCHITECTURES[match[1] if match else None]


def digest(source: Path, *facts: str) -> str:
    """Hash of a source, of the headers of ours that it includes, and of `facts`; of no path and no time."""
    files, pending = {}, [source]
    while pending:
        file = pending.pop()
        if file not in files:
            files[file] = file.read_text()
            pending += [CSRC / name for name in re.findall(r'^#include "(.*)"', files[file], re.MULTILINE)]
    content = [f"{file.relative_to(CSRC)}\n{text}" for file, text in sorted(files.items())]
    return hashlib.sha256("\0".join((*content, *facts)).encode()).hexdigest()[:16]


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def jobs() -> int:
    """As many compilers as there are cores and memory for."""
    with open("/proc/meminfo") as meminfo:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read())[1]) / 2**20
    return max(1, min(len(os.sched_getaffinity(0)), int(free / GB_PER_JOB)))


def build(target: Path) -> None:
    """Compile what is not in build/cuda yet, and link `target`."""
    nvcc, cxx = find_nvcc(), shutil.which(os.environ.get("CXX", "g++"))
    if nvcc is None:
        raise CannotBuild("nvcc is missing: pip install 'cuda-toolkit[nvcc,cccl]', or set CUDA_HOME")
    if cxx is None:
        raise CannotBuild("g++ is missing: apt-get install g++")
    python_include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(python_include, "Python.h")):
        raise CannotBuild("Python.h is missing: apt-get install python3-dev")
    try:
        import ninja
        import pybind11
    except ImportError as missing:
        raise CannotBuild(f"{missing.name} is missing: pip install pybind11 ninja") from None
    release = re.search(r"release [\d.]+", subprocess.check_output([nvcc, "--version"], text=True))[0]

    rules, edges, objects = [], [], []

    def compile_with(rule: str, command: list[str], source: Path, key: str) -> None:
        built = OBJECTS / f"{source.stem}-{key}.o"
        objects.append(str(built))
        if built.exists():
            return
        quoted = " ".join(f"'{word}'" for word in command)
        # under its own name only once it is whole: whoever is interrupted leaves no half an object
        command_line = f"{quoted} -c $in -o $out.part && mv $out.part $out"
        rules.append(f"rule {rule}\n  command = {command_line}\n  description = {source.name}\n")
        edges.append(f"build {escape(built)}: {rule} {escape(source)}\n")

    for source in sorted(CSRC.glob("*.cu")):
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures(source)]
        include = []
        if uses_cutlass(source):
            key = digest(source, release, CUTLASS, *NVCC_FLAGS, *gencode)
            if not (OBJECTS / f"{source.stem}-{key}.o").exists():
                include = [f"-I{cutlass_include()}"]
        else:
            key = digest(source, release, *NVCC_FLAGS, *gencode)
        compile_with(source.stem, [nvcc, *NVCC_FLAGS, *gencode, f"-I{CSRC}", *include], source, key)
    bindings = CSRC / "bindings.cpp"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = digest(bindings, first_line(cxx, "--version"), pybind11.__version__, suffix, *CXX_FLAGS)
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{python_include}"]
    compile_with("bindings", [cxx, *CXX_FLAGS, *includes], bindings, key)

    OBJECTS.mkdir(parents=True, exist_ok=True)
    if edges:
        (OBJECTS / "build.ninja").write_text("\n".join([*rules, *edges]))
        ninja_binary = os.path.join(ninja.BIN_DIR, "ninja")
        run([ninja_binary, "-C", str(OBJECTS), "-j", str(jobs())], "compiling failed")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    run([nvcc, "-shared", "--no-device-link", "-cudart", "static", "-o", str(part), *objects], "linking failed")
    part.replace(target)  # never under the feet of a process that has the old one loaded


def uses_cutlass(source: Path) -> bool:
    return re.search(r"#include <(cute|cutlass)/", source.read_text()) is not None


def escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


def run(command: list[str], failure: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        error = re.search(r"^.*(?:error|fatal).*$", result.stdout, re.MULTILINE | re.IGNORECASE)
        raise CannotBuild(f"{failure}: {error[0].strip() if error else f'exit status {result.returncode}'}")


class BuildCuda(build_ext):
    """Builds the extension with ninja and nvcc; a failure is a line of text, not the end of the installation."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except CannotBuild as reason:
            print(
                f"hybrid-ops: installing without the CUDA extension (Triton and CPU paths only): {reason}", flush=True
            )
        except Exception as error:  # an unforeseen machine must not stop the installation either
            print(
                f"hybrid-ops: installing without the CUDA extension (Triton and CPU paths only): "
                f"{type(error).__name__}: {error}",
                flush=True,
            )


def main() -> None:
    options = {}
    if wanted():
        sources = [str(p.relative_to(ROOT)) for p in (*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp")]
        options["ext_modules"] = [Extension("hybrid_ops._cuda", sources, optional=True)]
        options["cmdclass"] = {"build_ext": BuildCuda}
        if "setuptools.build_meta" in sys.modules:  # pip asks for build requirements; `python setup.py` would download
            options["setup_requires"] = [CUTLASS]
    setup(**options)


if __name__ == "__main__":
    main()
