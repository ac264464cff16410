#!/usr/bin/env bash
# Show that a wheel works where nothing else is installed: an empty virtual environment in a new
# folder, no network, the README's quick start.
#
#     scripts/verify_wheel.sh wheelhouse/qcow2x-*.whl [python3]
set -euo pipefail

wheel=$(realpath "$1")
python=${2:-python3}
scripts=$(dirname "$(realpath "$0")")

elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
quickstart=$elsewhere/quickstart.py
"$python" "$scripts/quickstart.py" > "$quickstart"

"$python" -m venv "$elsewhere/venv"
installed=$elsewhere/venv/bin/python
"$installed" -m pip install --quiet --no-index --no-deps "$wheel"

cd "$elsewhere"
# -I: neither the environment nor the folder lends a module.
"$installed" -I "$scripts/bundled_libraries.py"
"$installed" -I "$quickstart"
"$elsewhere/venv/bin/qcow2x" --version
echo "$(basename "$wheel") works in an empty environment"
