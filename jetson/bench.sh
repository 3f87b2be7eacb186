#!/usr/bin/env bash
# Measures edge_ser on this board: latency, energy, memory and accuracy, in every precision, on
# TensorRT and on the processor. What fails is a cell with its error; the rest goes on.
#
# usage: jetson/bench.sh --out FILE [--bundle NAME|DIR] [--manifest CSV] [--runs N]
#
#   --out       the JSON file to write
#   --bundle    embedded model or folder (default); full precision needs a folder that holds it
#   --manifest  clips to score: columns path and emotion; without it accuracy is not measured
#   --runs      measured runs of a cell (200)
#
# Run it in the environment of edge_ser. For the power mode and the clocks it needs root: be root,
# or run `sudo -v` first. Where power is measured a cell takes 44 s more: leave the board alone.
set -euo pipefail

refuse() {
    echo "bench.sh: $1" >&2
    exit 2
}

out='' bundle=default manifest='' runs=200
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    --out | --bundle | --manifest | --runs)
        [ $# -ge 2 ] || refuse "$1 has no value"
        declare "${1#--}=$2"
        shift 2
        ;;
    *) refuse "argument '$1'; allowed: --out, --bundle, --manifest, --runs, --help" ;;
    esac
done
[ -n "$out" ] || refuse "no --out FILE; it is what you contribute"
out="$(realpath -m "$out")"
[ -d "$(dirname "$out")" ] || refuse "no folder '$(dirname "$out")' for --out"
if [ -d "$bundle" ]; then bundle="$(realpath "$bundle")"; fi
if [ -n "$manifest" ]; then manifest="$(realpath -m "$manifest")"; fi

# What runs is the edge_ser of this checkout, whose commit the result names.
cd "$(dirname "$0")/.."
edge_ser=(python3 -m edge_ser)
"${edge_ser[@]}" --version >/dev/null 2>&1 || refuse "edge_ser does not run; activate its environment first"

work="$(mktemp -d)"
watcher=''
trap '[ -z "$watcher" ] || kill "$watcher" || true; rm -rf "$work"' EXIT

# record NAME COMMAND...: keeps what it prints, or why it fails; nothing where it is not there.
record() {
    local name="$1"
    shift
    if command -v "$1" >/dev/null; then
        "$@" >"$work/$name" 2>"$work/$name.error" || true
    fi
}

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
record nvpmodel "${as_root[@]}" nvpmodel -q
record jetson_clocks "${as_root[@]}" jetson_clocks --show
# shellcheck disable=SC2016 # the ${Version} is dpkg's
record jetpack dpkg-query --show --showformat '${Version}' nvidia-jetpack

# One line of tegrastats: temperatures, and memory in use.
state() {
    if command -v tegrastats >/dev/null; then
        # The second line finds nobody who reads it: tegrastats ends.
        record "$1" bash -c 'tegrastats --interval 200 | head -n 1'
    fi
}
state before

# The memory that is available, in kB, now and then every half second.
watch_memory() {
    while true; do
        awk '/^MemAvailable:/ {print $2}' /proc/meminfo
        sleep 0.5
    done
}

# ask FILE ARGUMENTS...: keeps what edge_ser answers, and if it fails, its error.
ask() {
    local file="$1"
    shift
    if "${edge_ser[@]}" "$@" --json >"$file.json" 2>"$file.error"; then
        rm "$file.error"
    else
        tail -n 1 "$file.error" >&2
        return 1
    fi
}

ask "$work/bundle" info --bundle "$bundle" || exit 1
if [ -n "$manifest" ]; then
    python3 -m jetson.collect clips "$manifest" "$bundle" >"$work/clips" || exit 1
fi

# cell ENGINE PRECISION [--threads N]: one way to compute, in the folder of its own.
cell() {
    local folder options
    echo "bench.sh: $*" >&2
    number=$((number + 1))
    folder="$work/cells/$number" # fewer than ten
    mkdir -p "$folder"
    options=(--bundle "$bundle" --precision "$2")
    printf '%s\n' "$1" "$2" "${4-}" >"$folder/asked"
    if [ "$1" = tensorrt ]; then
        ask "$folder/build" build "${options[@]}" || return 0
    fi
    options+=(--engine "$1" "${@:3}")
    watch_memory >"$folder/available_kb" &
    watcher=$!
    ask "$folder/bench" bench "${options[@]}" --runs "$runs" || true
    kill "$watcher"
    wait "$watcher" || true
    watcher=''
    [ ! -e "$folder/bench.error" ] || return 0
    # By itself, so that a board whose power nobody measures still has its latencies.
    ask "$folder/energy" bench "${options[@]}" --runs 1 --energy || true
    if [ -n "$manifest" ]; then
        # A clip that is refused has a line that says so; the others count.
        xargs -0 -a "$work/clips" "${edge_ser[@]}" predict "${options[@]}" --json \
            >"$folder/predict.json" 2>"$folder/predict.error" || true
    fi
}
number=0
for precision in int8 fp16 fp32; do
    cell tensorrt "$precision"
done
for precision in int8 fp32; do
    cell onnx "$precision" --threads 1
    cell onnx "$precision"
done

verify=(verify --bundle "$bundle")
if [ -n "$manifest" ]; then verify+=(--manifest "$manifest"); fi
for engine in tensorrt onnx; do
    echo "bench.sh: verify $engine" >&2
    ask "$work/verify_$engine" "${verify[@]}" --engine "$engine" || true
done
state after

python3 -m jetson.collect result "$work" ${manifest:+"$manifest"} >"$work/result"
mv "$work/result" "$out"
echo "bench.sh: wrote $out" >&2
