#!/bin/bash
# The long forms of kernel-tests/power, torture and containerd, one after the other: CUTS of
# the power for each kernel, ROUNDS kills at every named place on this machine and in guests
# with KERNELS, MINUTES each of a lying registry and of everything at once. SEED replays. It
# ends with one line of counts, and with 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
export CUTS=${CUTS:-1000} ROUNDS=${ROUNDS:-100} MINUTES=${MINUTES:-10} CGO_ENABLED=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0

run() {
  go test -count=1 -timeout 0 -v "$@" | grep --line-buffered -E 'SEED|^ *---|_test\.go|^FAIL|^total' | tee -a "$log"
}

run -run 'TestFanotify|TestGuests' ./kernel-tests/power || failed=$((failed + 1))

# The guests side by side share the processors: emulated ones cost much that wait for each other.
read -ra kernels <<<"${KERNELS:-6.1 6.12}"
cpus=$(($(nproc) / ${#kernels[@]}))
guests=()
for kernel in "${kernels[@]}"; do
  vm="go run github.com/erofsd/erofsd/kernel-tests/vm -timeout 24h -cpus $((cpus > 0 ? cpus : 1)) -kernel $kernel -env ROUNDS=$ROUNDS${SEED:+ -env SEED=$SEED}"
  run -tags failpoint -exec "$vm" -run 'TestKillMatrix|TestKilledTogether|TestKeeperKilled|TestNoSuccessor|TestSignals|TestOutOfMemory|TestUpgrade|TestLostTable' ./kernel-tests/torture &
  guests+=($!)
done
for guest in "${guests[@]}"; do
  wait "$guest" || failed=$((failed + 1))
done

run -tags failpoint ./kernel-tests/torture || failed=$((failed + 1))
ROUNDS=$((ROUNDS / 25 + 1)) run -run TestKillMatrix ./kernel-tests/containerd || failed=$((failed + 1)) # each round is minutes

awk -v runs="$failed" '
  /: cut at entry/ { cuts++ }
  /^total:/ { died += $2; reads += $5; wrong += $7; zeros += $9; eio += $13; denied += $15 }
  /^--- FAIL/ { bad++ }
  /^ *--- SKIP/ { skipped++ }
  END {
    printf "cuts %d, workers killed %d, reads %d, wrong %d, zeros %d, EIO %d and %d where nobody has the bytes, tests failed %d, skipped %d, runs failed %d\n",
      cuts, died, reads, wrong, zeros, eio, denied, bad, skipped, runs
  }' "$log"
[ "$failed" -eq 0 ]
