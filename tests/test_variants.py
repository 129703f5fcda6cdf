import platform
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import python

import fastbn
from fastbn import functional
from fastbn.kernels.variants import NEEDED, available_isas
from fastbn.runtime.cpu import cpu_features

CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.parametrize("isa", available_isas())
def test_fastbn_isa_forces_a_variant(isa):
    code = "import fastbn; print(fastbn.runtime_info()['isa'])"
    assert python(code, FASTBN_ISA=isa).stdout.strip() == isa


@pytest.mark.parametrize("isa", ["sse9", "", "AVX2"])
def test_an_unknown_fastbn_isa_is_an_import_error(isa):
    result = python("import fastbn", FASTBN_ISA=isa)
    assert result.returncode != 0
    expected = f"ImportError: FASTBN_ISA: expected one of {', '.join(available_isas())}"
    assert expected in result.stderr
    assert f"got {isa!r}" in result.stderr


@pytest.mark.skipif("avx512" in available_isas(), reason="this machine runs every variant")
def test_a_variant_that_does_not_run_here_is_an_import_error():
    result = python("import fastbn", FASTBN_ISA="avx512")
    assert "ImportError: FASTBN_ISA: expected one of" in result.stderr
    assert "got 'avx512'" in result.stderr


def test_the_fastest_variant_is_the_default():
    code = "import fastbn; print(fastbn.runtime_info()['isa'])"
    assert python(code, FASTBN_ISA=None).stdout.strip() == available_isas()[-1]


def test_runtime_info_tells_what_runs(threads):
    info = fastbn.runtime_info()
    assert info["fastbn"] == fastbn.__version__
    assert info["numpy"] == np.__version__
    assert info["python"] == platform.python_version()
    assert info["isa"] in info["available_isas"]
    assert info["available_isas"][0] == "baseline"
    assert ("avx2" in info["available_isas"]) == ("avx2" in info["cpu_features"])
    assert info["threads"] == threads


@pytest.mark.skipif("flags" not in CPUINFO, reason="no x86 flags in /proc/cpuinfo")
def test_cpu_features_are_those_that_the_kernel_reports():
    flags = set(re.findall(r"^flags\s*: (.*)", CPUINFO, re.MULTILINE)[0].split())
    assert set(cpu_features()) == flags & set[str]().union(*NEEDED.values())


def test_importing_fastbn_needs_numpy_alone():
    code = (
        "import sys; before = set(sys.modules); import numpy; import fastbn\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(roots & {'sklearn', 'scipy', 'matplotlib', 'tqdm', 'torch', 'Cython'}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_importing_fastbn_takes_at_most_30_ms_beside_numpy(tmp_path):
    code = (
        "import numpy, time; before = time.thread_time(); import fastbn\n"
        "print(time.thread_time() - before)"
    )
    # As after an installation: the modules are compiled to bytecode, here by the first run.
    cached = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    seconds = [float(python(code, **cached).stdout) for _ in range(6)]
    assert min(seconds) <= 0.030


def test_kernels_of_another_version_are_refused():
    other = SimpleNamespace(__name__="fastbn.kernels.other", job_size=8, kernel=None)
    with pytest.raises(ImportError, match=r"fastbn.kernels.other: expected a module compiled with"):
        functional.use_kernels(other)
    fastbn.batch_norm(np.ones((2, 2)))  # by the kernels that there were


def test_sources_that_were_not_compiled_say_so(tmp_path):
    package = Path(fastbn.__file__).parent
    compiled = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(package, tmp_path / "fastbn", ignore=compiled)
    result = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastbn")
    assert f"fastbn: expected compiled modules in {tmp_path / 'fastbn'}" in result.stderr
    assert "pip install -e ." in result.stderr
