#!/usr/bin/env bash
# A rented GPU that is there for minutes, without a network, over a copy of this tree without its history: what to do
# with it, in stages of less than ten minutes. Each leaves its results in the folder $OUT.
#
# At home, before each lease, with all work committed:
#
#     bash scripts/lease.sh home FOLDER     # with unpack.py and cifar10/: twelve .webp, labels.npz, batches.meta
#
# makes .lease, which git ignores: the images in two halves of 50 MB, for machines to which no more than 64 MiB go at a
# time, and a kit of the commit's name and of the one package that the bench needs and such machines lack (of the test
# extra they need no more). On the machine, one after the other without a pause, each with the named parts of .lease:
#
#     data1, tests                                      kit, half1
#     data2, probe --graph                              kit, half2
#     sweep 9m --graph                                  kit
#     bench engine                                      kit
#
# Bring what is in $OUT home after each. `sweep` goes on where the one before it stopped, as long as it is the same
# machine. Leave --graph out unless `tests` has passed. Afterwards, at home:
#
#     .venv/bin/python -m samlib import PATH/export                        # into runs; records that are sound into
#     .venv/bin/python -m samlib import PATH/export --store results        # results, and commit them: the next lease
#                                                                          # makes no run that it finds there
#     cp PATH/probe.json results/gpu/                                      # for estimates of the next lease
#
# A checkpoint that came back goes along in runs/gpu with the first stage alone: later it would undo what was done.
#
# Environment: PYTHON (python3), DEVICE (cuda), WORK (~/lease: data and packages on the machine), LIMIT (560 seconds,
# after which tests and bench are interrupted). With OUT, DEVICE=cpu and .venv/bin/python every stage runs at home, too.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?home, data1, data2, tests, probe, sweep or bench}
shift
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} WORK=${WORK:-$HOME/lease} LIMIT=${LIMIT:-560}
export SAMLIB_DATA=$WORK/data PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

home() {
    local from=$1 package bytes
    if [ -n "$(git status --porcelain)" ]; then
        echo "lease: there is work that is not committed; its records could not become committed ones" >&2
    fi
    git check-ignore -q .lease || echo /.lease/ >>"$(git rev-parse --git-path info/exclude)"
    rm -rf .lease && mkdir -p .lease/kit .lease/half1 .lease/half2
    git describe --always --abbrev=40 --dirty --exclude '*' >.lease/kit/commit
    package=$(grep -o '^pytorch-optimizer==[0-9.]*' requirements.lock)
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -d .lease/kit "$package"
    cp "$from"/cifar10/train-0[0-5].webp .lease/half1
    cp "$from"/unpack.py "$from"/cifar10/train-0[6-9].webp "$from"/cifar10/test-*.webp .lease/half2
    cp "$from"/cifar10/labels.npz "$from"/cifar10/batches.meta .lease/half2
    bytes=$({ git ls-files -z && find .lease/kit .lease/half2 -type f -print0; } | xargs -0 cat | wc -c)
    echo "$((bytes >> 20)) of the 64 MiB that travel"
}

data1() {
    mkdir -p "$WORK/pieces/cifar10"
    cp .lease/half1/*.webp "$WORK/pieces/cifar10"
    du -b "$WORK"/pieces/cifar10/* | tee "$OUT/data1.txt"
}

data2() {
    cp .lease/half2/* "$WORK/pieces/cifar10"
    mv "$WORK/pieces/cifar10/unpack.py" "$WORK/pieces"
    "$PYTHON" "$WORK/pieces/unpack.py" "$SAMLIB_DATA" cifar10 | tee "$OUT/data2.txt" # ends with 1 at a wrong md5 sum
    du -ab "$SAMLIB_DATA" | tee -a "$OUT/data2.txt"
}

# The files come in the order in which they build on each other: the first failure says most.
tests() {
    local files=(tests/test_{optim_cuda,graph_cuda,train_cuda,arithmetic,augment,bench}.py)
    timeout -s INT -k 20 "$LIMIT" "$PYTHON" -m pytest -q --durations=10 --maxfail=40 -p no:cacheprovider \
        -k "optim_cuda or graph_cuda or train_cuda or on_a_gpu or a_graph_draws" --junitxml "$OUT/tests.xml" \
        "$@" "${files[@]}" 2>&1 | tee "$OUT/tests.log"
}

samlib_run() {
    local known=()
    [ -d results/gpu ] && known=(--known results/gpu)
    "$PYTHON" -m samlib run --profile gpu --device "$DEVICE" "${known[@]}" "$@"
}

probe() {
    samlib_run --probe --dry-run --time-limit 9m "$@" 2>&1 | tee "$OUT/plan.txt"
    if [ -f runs/gpu/probe.json ]; then cp runs/gpu/probe.json "$OUT"; fi
}

sweep() {
    local limit=${1:?a time limit such as 9m} code=0
    shift
    set -- --time-limit "$limit" --export "$OUT/export" --with-checkpoints "$@"
    samlib_run "$@" 2>&1 | tee "$OUT/sweep.log" || code=$?
    if [ -f runs/gpu/probe.json ]; then cp runs/gpu/probe.json "$OUT"; fi
    return "$code"
}

bench() {
    timeout -s INT -k 20 "$LIMIT" "$PYTHON" -m samlib bench --device "$DEVICE" --json "$OUT/bench.json" \
        --only "$@" 2>&1 | tee "$OUT/bench.log"
}

if [ "$stage" != home ]; then
    mkdir -p "${OUT:?the folder for what comes back}" "$WORK"
    [ -d "$WORK/site" ] || "$PYTHON" -m pip install -q --no-index --no-deps --target "$WORK/site" .lease/kit/*.whl
    SAMLIB_COMMIT=$(cat .lease/kit/commit)
    export SAMLIB_COMMIT PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
fi
case $stage in
    home | data1 | data2 | tests | probe | sweep | bench) "$stage" "$@" ;;
    *) echo "lease: stage $stage is unknown" >&2 && exit 2 ;;
esac
