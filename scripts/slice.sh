#!/usr/bin/env bash
# A thin slice of the gpu profile through every station: run, kill, resume, export, import, notebook. Needs CIFAR-10
# (SAMLIB_DATA), and a GPU or a quarter of an hour.
#
#     bash scripts/slice.sh FOLDER [cpu|cuda]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "$1" && cd "$1" && pwd)
device=${2:-cpu}
python=.venv/bin/python
overrides="{epochs: 2, data.train_size: 2000}"
slice=(--profile gpu --experiment sam_vs_sgd --seeds 20 --override epochs=2 --override data.train_size=2000 --device "$device")

echo "== an uninterrupted run"
"$python" -m samlib run "${slice[@]}" --store "$folder/whole"

echo "== one that is killed three times and goes on"
# A checkpoint after every step, and a kill once there is one of a further step.
killed="
import os, signal
from samlib import __main__, train
train.CHECKPOINT_SECONDS = 0.0
save, begun = train.Training.save, []
def saved(self, path):
    save(self, path)
    begun.append(self.step)
    if len(begun) == 7:
        print(f'killed at step {self.step}', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
train.Training.save = saved
__main__.main()"
for _ in 1 2 3; do
    if "$python" -c "$killed" run "${slice[@]}" --store "$folder/cut" --time-limit 10m; then
        echo "nothing was killed" >&2
        exit 1
    fi
    ls -l "$folder"/cut/gpu/checkpoints/*.pt
done
"$python" -m samlib run "${slice[@]}" --store "$folder/cut" --export "$folder/export"

echo "== the two have the same numbers"
"$python" - "$folder" "$device" <<'PYTHON'
import sys
from pathlib import Path

from samlib.store import Store

folder, device = sys.argv[1:]
whole, cut = (Store(Path(folder) / name / "gpu") for name in ("whole", "cut"))
assert whole.recorded() == cut.recorded() and whole.recorded()
for one in whole.records():
    other = cut.load(one.key)
    exact = (one.history, one.final, one.measures) == (other.history, other.final, other.measures)
    losses = zip(one.history["running_loss"], other.history["running_loss"], strict=True)
    near = device != "cpu" and all(abs(a - b) < 0.02 * a for a, b in losses)  # a GPU adds in no fixed order
    assert exact or near, one.key
    print(one.key, one.status, "the same" if exact else "another rounding")
PYTHON

echo "== the export, imported, makes the page"
"$python" -m samlib import "$folder/export" --profile gpu --store "$folder/imported"
"$python" notebooks/execute.py --profile gpu --store "$folder/imported" -p seeds "[20]" -p overrides "$overrides" \
    --out "$folder/pages" 01_sam_vs_sgd
echo "== done: $folder/pages/01_sam_vs_sgd.ipynb"
