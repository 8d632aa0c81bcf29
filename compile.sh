#!/usr/bin/env bash
# The one set-up: installs the requirements, builds the extension in place and installs the package in editable mode,
# in the active virtual environment or else in .venv. A second run does only what has changed.
#
#   ./compile.sh                      PYTHON=python3.12 ./compile.sh
#
# Other scripts source it, and go on in the environment that it leaves active.
# Environment: PYTHON (interpreter), CXX, CUDA_HOME, FORCE_CUDA=1 (CUDA even without a GPU), TORCH_CUDA_ARCH_LIST,
# MAX_JOBS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "error: $*" >&2; exit 1; }
say() { echo "==> $*"; }

# --- The interpreter -------------------------------------------------------------------------------------------------
environment=${VIRTUAL_ENV:-}
if [ -z "$environment" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then environment=$CONDA_PREFIX; fi
python=${PYTHON:-${environment:+$environment/bin/python}}
python=${python:-python3}
command -v "$python" > /dev/null || fail "there is no $python: install Python 3.11 to 3.13, or name one with PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || fail "$python does not run"
case $version in
    3.11 | 3.12 | 3.13) ;;
    *) fail "$python is Python $version, and 3.11 to 3.13 is needed: name another one with PYTHON=..." ;;
esac
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] ||
    fail "$headers/Python.h is missing: install the headers of Python $version (Debian: apt install python$version-dev)"
[ "$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("Py_GIL_DISABLED") or 0)')" = 0 ] ||
    fail "$python is a free-threaded build, which cannot load the extension: name another one with PYTHON=..."

# --- The C++ compiler ------------------------------------------------------------------------------------------------
if [ -z "${CXX:-}" ]; then
    CXX=$(basename "$(command -v c++ || command -v g++ || command -v clang++)")
    [ -n "$CXX" ] ||
        fail "there is no C++ compiler: install one (Debian: apt install g++), or name it with CXX=..."
fi
command -v "${CXX%% *}" > /dev/null || fail "CXX=$CXX is not a program: name a C++ compiler, or unset CXX"
openmp=$([ "$(uname)" = Linux ] && echo -fopenmp || true)
message=$(echo '#include <concepts>
int check(std::integral auto i) { return i; }
int main() { return check(0); }' | $CXX -std=c++20 $openmp -x c++ - -o /dev/null 2>&1) ||
    fail "$CXX cannot build C++20 with OpenMP: $(grep -m1 error <<< "$message" || head -n1 <<< "$message")"
export CXX

# --- The environment -------------------------------------------------------------------------------------------------
[ -w . ] || fail "$PWD cannot be written to, and the extension is built in it"
prefix=$("$python" -c 'import sys; print(sys.prefix)')
if [ "$prefix" = "$environment" ] || [ "$prefix" != "$("$python" -c 'import sys; print(sys.base_prefix)')" ]; then
    environment=$prefix
else
    environment=$PWD/.venv
    if [ -e .venv/bin/python ] || [ -L .venv/bin/python ]; then  # a link whose Python is gone counts as well
        found=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) ||
            fail ".venv/bin/python does not run: remove .venv and start again"
        [ "$found" = "$version" ] ||
            fail ".venv holds Python $found, and $python is $version: remove .venv, or set PYTHON=python$found"
    else
        "$python" -c 'import venv, ensurepip' 2> /dev/null ||
            fail "$python cannot make a virtual environment: install its module venv" \
                "(Debian: apt install python$version-venv)"
        say "making .venv with Python $version"
        "$python" -m venv .venv || fail "$python -m venv .venv failed"
    fi
    say "using $environment"
fi
export PATH=$environment/bin:$PATH
[ -e "$environment/pyvenv.cfg" ] && export VIRTUAL_ENV=$environment
unset PYTHONHOME PYTHONSAFEPATH  # these name another library, and hide setup.py

# --- Requirements ----------------------------------------------------------------------------------------------------
# What an expression in setup.py gives. Assigned first, never inside a test, so that its failure ends the set-up.
ask() { python -c "import setup; answer = setup.$1; print(*answer if isinstance(answer, list) else [answer])"; }

pip_install() {  # what it is for, then the arguments of pip install
    local what=$1 log reason
    shift
    python -m pip --version > /dev/null 2>&1 || fail "$environment has no pip: run $environment/bin/python -m ensurepip"
    log=$(mktemp)
    say "installing $what: $*"
    { python -m pip install "$@" 2>&1 >&3 | tee "$log" >&2; } 3>&1 || {
        reason=$(grep '^ERROR' "$log" | tail -n1 | cut -c8- || true)
        if grep -qE 'connection broken|Failed to establish|name resolution' "$log"; then
            reason="it cannot reach its index: check the network, or set PIP_INDEX_URL ($reason)"
        fi
        fail "pip could not install $what: $reason"
    }
    rm -f "$log"
}

install_requirements() {
    local torch missing free lite rest desktop message
    torch=$(ask 'installed("torch")')
    missing=$(ask 'missing(setup.build_requirements() + setup.requirements())')
    if [[ " $missing" = *' torch>='* ]]; then
        [ "$torch" = None ] || fail "torch $torch is installed in $environment, and 2.11 or later is needed:" \
            "run 'pip install --upgrade torch torchvision' there, or use a fresh environment"
        free=$(df -Pk "$environment" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
        [ "$free" -ge 8 ] || fail "$free GB are free in $environment, and torch with its libraries needs 8"
    elif [ -n "$missing" ]; then
        missing="$missing torch==$torch"  # so that a torchvision is found for this torch, not another torch
    fi
    if [ -n "$missing" ]; then
        # mmcv-lite would bring mmengine, also where onedl-mmengine stands in for it; the rest others bring.
        lite=$(tr ' ' '\n' <<< "$missing" | grep '^mmcv-lite' || true)
        rest=$(tr ' ' '\n' <<< "$missing" | grep -v '^mmcv-lite' || true)
        [ -z "$rest" ] || pip_install 'the requirements' $rest packaging
        [ -z "$lite" ] || pip_install 'the requirements' --no-deps $lite
    fi
    desktop=$(ask 'installed("opencv-python")')
    if [ "$desktop" != None ] || ! python -c 'import cv2' 2> /dev/null; then
        # Both own the folder cv2, and this one needs libGL and libX11, which a server does not have.
        say 'replacing opencv-python, which needs libraries of a desktop, by its headless twin'
        python -m pip uninstall --quiet --yes opencv-python
        rest=$(ask 'requirements()' | tr ' ' '\n' | grep '^opencv')
        pip_install 'OpenCV' --quiet --force-reinstall --no-deps "$rest"
    fi
    message=$(python -c 'import torch, torchvision, cv2, mmengine, mmcv' 2>&1) ||
        fail "the requirements are installed but do not work together: $(tail -n1 <<< "$message")"
}

# --- The extension and the package -----------------------------------------------------------------------------------
build() {
    local compiler editable message
    compiler=$(ask 'missing_cuda_compiler()')
    [ -z "$compiler" ] ||
        pip_install 'a CUDA compiler (else set CUDA_HOME, or hide the GPU with CUDA_VISIBLE_DEVICES=)' $compiler
    say "building mmdet._C (minutes the first time)"
    # Of ninja's lines the file's name alone; without torch's remarks on the toolkit, which setup.py has judged.
    python setup.py --quiet build_ext --inplace --force 2>&1 | sed -uE \
        -e 's|^(\[[0-9]+/[0-9]+\]) .* -c .*(mmdet/ops/csrc/[^ ]+\.c[pu]+).*|\1 \2|' -e '/cpp_extension.py:[0-9]+\]/d' ||
        fail 'the extension was not built: the compiler says why above'
    editable=$(ask 'installed_editable()')
    [ "$editable" = True ] ||
        pip_install 'mmdet' --quiet --no-build-isolation --no-deps -e .

    python -m mmdet.utils.collect_env
    message=$(python -c 'import torch, mmdet._C' 2>&1) ||
        fail "mmdet._C was built but cannot be loaded: $(tail -n1 <<< "$message")"
    ask 'fingerprint()' > build/fingerprint
}

other=$(ask 'installed("mmdet")')
[ "$other" = None ] ||
    fail "OpenMMLab's mmdet is installed in $environment, and Python would import it instead of this one:" \
        "run 'pip uninstall mmdet' there, or use a fresh environment"
up_to_date=$(ask 'up_to_date()')
if [ "$up_to_date" = True ]; then
    say 'nothing has changed since the last set-up'
else
    install_requirements
    build
fi
if [ "${BASH_SOURCE[0]}" = "$0" ] && [ "$environment" = "$PWD/.venv" ]; then
    say 'ready; activate the environment with: . .venv/bin/activate'
fi
