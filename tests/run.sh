#!/usr/bin/env bash
# Set up, then check style and types and run the tests: tests/run.sh [--slow] [arguments of pytest]
set -euo pipefail
. "$(dirname "$0")/../compile.sh"

tools=$(ask 'missing(setup.test_requirements())')
[ -z "$tools" ] || pip_install 'the test tools' $tools
say 'ruff'
ruff check .
say 'mypy'
mypy
say 'pytest'
python -m pytest "$@"
