#!/usr/bin/env bash
# Build the wheel and the sdist, and try each in an empty environment, away from the checkout:
# it installs, its version is mlxshim.__version__, it imports no more than it should, and
# `python -m mlxshim` passes.
#
#     scripts/check_release.sh [FOLDER]     # where the two files go, if they are to be kept
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
out=${1:-$work/dist}

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q build
"$work/build/bin/python" -m build -q --outdir "$out" .
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' mlxshim/__init__.py)
wheel=$out/mlxshim-$version-py3-none-any.whl
sdist=$out/mlxshim-$version.tar.gz

for file in "$wheel" "$sdist"; do
    echo "== $(basename "$file")"
    env=$work/env-${file##*.}
    "$python" -m venv "$env"
    "$env/bin/python" -m pip install -q "mlxshim[cpu] @ file://$(realpath "$file")"
    (
        cd "$work"
        "$env/bin/python" - "$version" <<'PY'
import importlib.metadata
import sys

import mlxshim

assert mlxshim.__version__ == sys.argv[1] == importlib.metadata.version("mlxshim")
assert "site-packages" in mlxshim.__file__, mlxshim.__file__
heavy = {"numpy", "mlx.nn", "mlx.optimizers"} & set(sys.modules)
assert not heavy, f"import mlxshim brings in {heavy}"
needed = [r for r in importlib.metadata.requires("mlxshim") if "extra ==" not in r]
assert sorted(r.split(">")[0] for r in needed) == ["mlx", "typing-extensions"], needed
from importlib.resources import files

assert files("mlxshim").joinpath("py.typed").is_file(), "py.typed is missing"
PY
        "$env/bin/python" -m mlxshim
    )
done
echo "mlxshim $version: wheel and sdist install, and pass in an empty environment"
