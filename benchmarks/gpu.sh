#!/usr/bin/env bash
# Everything that wants measuring on a GPU, in one command and within MINUTES (9) of wall time:
#
#   benchmarks/gpu.sh
#
# First bfloat16 with a profile, then how several GPUs share an update if there are several, then float32,
# then a real run for the minutes that are left.
# Results go to $OUT (default benchmarks/out), one flat folder, and are rewritten after every section, so that
# what is cut off costs only itself: a JSON file for each part, all tables, the trace, and the run's metrics.
# The exit code is 1 if a measurement failed, was cut off or found no time left.
#   PYTHON   the Python that has JAX (default .venv/bin/python, else python3)
#   WHEELS   a folder of wheels of what that Python lacks; installed into a folder of their own first
#   AGENT, GAME  in place of the defaults
#   XLA_FLAGS  what XLA is told; it stands in every table, so two calls compare two settings
#   PRESET   for trying the script out: PRESET=debug QUICK=--quick MINUTES=2 benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

MINUTES=${MINUTES:-9}
QUICK=${QUICK:-}
OUT=${OUT:-benchmarks/out}
what=(--preset "${PRESET:-paper}" ${AGENT:+--agent "$AGENT"} ${GAME:+--game "$GAME"})
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
ends=$(($(date +%s) + MINUTES * 60))
left() { echo $((ends - $(date +%s))); }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT"
status=0
: >"$OUT/tables.txt"

if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$WHEELS"/*.whl ||
    echo "gpu.sh: the wheels in $WHEELS could not be installed; going on without them" >&2
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
gpus=0
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi

# bench NAME SECONDS ARGUMENTS…: measures for at most so long; no new measurement begins in the last fifth.
bench() {
  local name=$1 seconds=$2
  shift 2
  [ "$(left)" -lt "$seconds" ] && seconds=$(left)
  [ "$seconds" -lt 15 ] && { echo "== $name: no time left"; status=1; return; }
  echo "== $name, at most $seconds s"
  # shellcheck disable=SC2086
  timeout --kill-after=10 "$seconds" "$PYTHON" -m benchmarks "${what[@]}" $QUICK \
    --minutes "$(awk "BEGIN { print $seconds * 0.8 / 60 }")" --budget 10 --json "$OUT/$name.json" "$@" 2>&1 |
    tee -a "$OUT/tables.txt" || status=1
}

share() { echo $((MINUTES * 60 * $1 / 100)); }

# What matters most comes first.
bench bfloat16 "$(share 35)" --precision bfloat16 --only peak update compile breakdown acting loop --profile "$scratch/profile"
find "$scratch/profile" -name '*.trace.json.gz' -size -15M -exec cp {} "$OUT/trace.json.gz" \; 2>/dev/null
[ "$gpus" -gt 1 ] && bench scaling "$(share 15)" --precision bfloat16 --only scaling
bench growth "$(share 20)" --precision bfloat16 --only growth
bench float32 "$(share 15)" --precision float32 --only peak update breakdown
bench convolutions "$(share 8)" --precision bfloat16 --only convolutions

seconds=$(($(left) - 15))
if [ "$seconds" -gt 20 ]; then
  echo "== a real run for $seconds s"
  timeout --signal=TERM --kill-after=10 "$seconds" "$PYTHON" -m twister_jax train "${what[@]}" \
    --logdir "$scratch/run" 2>&1 | tee -a "$OUT/tables.txt"
  cp "$scratch/run/metrics.jsonl" "$OUT/metrics.jsonl" 2>/dev/null
fi
echo "== results in $OUT: $(ls "$OUT" | tr '\n' ' ')"
exit $status
