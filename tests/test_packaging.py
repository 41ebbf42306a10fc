"""Layers, wheel contents, build options: what holds the package together."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dalle_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))


def python_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


def test_the_compiled_sources_know_no_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)\b", name)], path


def test_kernels_never_import_the_model_layer():
    for path in python_files("dalle_kernels"):
        assert not {name for name in imported_modules(path) if name.partition(".")[0] == "dalle"}, path


def test_importing_the_kernels_is_light():
    """Nothing beyond what torch has imported already, but modules of our own and a few of the standard library."""
    code = "import sys, torch; before = set(sys.modules); import dalle_kernels\nprint(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported = {name for name in result.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert "dalle_kernels._dispatch" in imported
    assert not {name for name in imported if name.partition(".")[0] != "dalle_kernels"}
    assert len(imported) < 64
    assert not any(name.endswith(("triton_kernels", "_cpu", "_cuda", ".testing")) for name in imported)


def test_every_folder_with_modules_is_a_package():
    for package in ("dalle", "dalle_kernels"):
        for folder in {path.parent for path in python_files(package)}:
            assert (folder / "__init__.py").exists(), f"{folder} would be missing from a wheel"


def test_both_packages_are_typed():
    assert (ROOT / "dalle" / "py.typed").exists() and (ROOT / "dalle_kernels" / "py.typed").exists()


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["DALLE_KERNELS_CUDA=maybe"], "expected DALLE_KERNELS_CUDA to be auto, on or off, got 'maybe'"),
        (["DALLE_KERNELS_CUDA_ARCHITECTURES=hopper"], "to list architectures such as 80;90a, got 'hopper'"),
        (["DALLE_KERNELS_CUDA=on", "NVCC="], "DALLE_KERNELS_CUDA=on needs nvcc, and none was found"),
    ],
)
def test_wrong_build_options_get_one_clear_sentence(options, sentence, tmp_path):
    command = [CMAKE, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), *(f"-D{o}" for o in options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert sentence in " ".join(result.stderr.split())


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("architectures", "has"),
    [("80;90a", True), ("80,90a-real", True), ("80;90;90a", False), ("90-virtual;90a", True), ("80;90", False)],
)
def test_the_kernels_for_hopper_are_there_where_they_are_compiled(architectures, has, tmp_path):
    """Elsewhere their bodies are empty, and they are refused. No compiler is needed to tell."""
    nobody = shutil.which("false")
    options = [f"DALLE_KERNELS_CUDA_ARCHITECTURES={architectures}", "DALLE_KERNELS_CUDA=on"]
    options += [f"NVCC={nobody}", f"CMAKE_CXX_COMPILER={nobody}"]
    command = [CMAKE, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *(f"-D{option}" for option in options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"kernels for Hopper GPUs: {'ON' if has else 'OFF'}" in result.stdout


@pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")
def test_no_openmp_runtime_is_linked():
    """It must come from torch: see csrc/common/parallel.cpp."""
    reader = shutil.which("readelf")
    if reader is None:
        pytest.skip("needs readelf")
    library = _native.library("cpu").__file__
    dynamic = subprocess.run([reader, "-d", library], check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in dynamic and not re.search(r"NEEDED.*(omp|torch|c10)", dynamic)


@pytest.mark.skipif(importlib.util.find_spec("dalle_kernels._cuda") is None, reason="the CUDA library is not built")
def test_the_cuda_library_loads_where_no_driver_is():
    """It looks the driver's functions up when it needs them, and says what is missing."""
    from dalle_kernels import _cuda

    reader = shutil.which("readelf")
    if reader is not None:
        dynamic = subprocess.run([reader, "-d", _cuda.__file__], check=True, capture_output=True, text=True).stdout
        assert "NEEDED" in dynamic and not re.search(r"NEEDED.*(libcuda\.|torch|c10|omp)", dynamic)
    program = "from dalle_kernels import _cuda; assert _cuda.device_status()"
    nowhere = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=nowhere, cwd=ROOT)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_code_of_one_instruction_set_can_be_linked_into_another():
    """Functions that the linker may merge must lie in their own build's namespace: see csrc/common/isa.h."""
    objects = list((ROOT / "build" / f"cmake-{sys.implementation.cache_tag}").glob("CMakeFiles/cpu_*.dir/**/*.o"))
    if not objects:
        pytest.skip("the compiled library was not built here")
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        symbols = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        merged = re.findall(r"^[0-9a-f]+ [WVu] (.+)$", symbols, re.MULTILINE)
        strangers = [name for name in merged if f"dalle::{isa}::" not in name and not name.startswith("DW.ref.")]
        assert not strangers, path


@pytest.mark.slow
def test_a_wheel_holds_the_two_packages_and_the_compiled_libraries_only(tmp_path):
    """Built without isolation, so that it takes no network, and here, where the libraries are compiled already."""
    pytest.importorskip("pybind11")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("dalle_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"dalle", "dalle_kernels"}
    libraries = [name for name in names if name.endswith(".so")]
    assert 1 <= len(libraries) <= 2 and all(re.match(r"dalle_kernels/_(cpu|cuda)\.", name) for name in libraries)
    modules = {str(path.relative_to(ROOT)) for package in ("dalle", "dalle_kernels") for path in python_files(package)}
    assert modules <= set(names)
    others = {name for name in names if name.startswith("dalle") and ".dist-info/" not in name}
    others -= modules | set(libraries) | {"dalle/py.typed", "dalle_kernels/py.typed"}
    recipes = {f"dalle/recipes/{path.name}" for path in (ROOT / "dalle" / "recipes").iterdir()}
    assert recipes and recipes <= others
    assert all(name.startswith("dalle/checkpoints/") for name in others - recipes), others
