#!/usr/bin/env bash
# Measure the runs of fidelity_runs.txt on this machine's GPU: bash docs/measurements/fidelity.sh RESULTS [SECONDS]
#
# RESULTS/fit_NAME.json are for `runner calibrate`, RESULTS/held_NAME.json for `runner compare --hardware`. The whole
# list takes about 25 minutes of an H200 with 16 cores. It ends before SECONDS are over (default 600) and goes on
# where it stopped when called again.
set -euo pipefail
results=${1:?give a folder for the results}
seconds=${2:-600}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$results"
results=$(cd "$results" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# A virtual machine hands out its memory at first touch, which made its first minutes 1.3 times slower: touch it.
touch_memory() {
    python3 - <<'PYTHON'
import multiprocessing
import os


def fill(nbytes: int) -> None:
    block = bytearray(nbytes)
    block[::4096] = b"\1" * len(block[::4096])


if __name__ == "__main__":
    cores = os.cpu_count() or 1
    share = int(0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // cores
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        pool.map(fill, [share] * cores, chunksize=1)
PYTHON
    touch "$results/.touched"
}

[ -e "$results/.touched" ] || touch_memory
python3 -c "import torch" # from disk into the page cache, so that no run pays for it
cd "$results"             # where the cache `kept` is
while read -r set name wants options; do
    case $set in '#') continue ;; esac
    run=${set}_$name
    [ -e "$run.done" ] && continue
    if [ $((SECONDS + wants * 5 / 4 + 30)) -gt "$seconds" ]; then
        echo "left for another call: $run"
        continue
    fi
    began=$SECONDS code=0
    # shellcheck disable=SC2086  # options are words
    timeout $((seconds - SECONDS)) python3 -m launch --device cuda --probe --max-tokens 8192 --timeout 400 \
        $options --timeline "$run.json" >"$run.log" 2>&1 </dev/null || code=$?
    echo "exit code $code" >"$run.done"
    echo "$run: exit code $code, $((SECONDS - began)) s"
done <"$here/fidelity_runs.txt"
