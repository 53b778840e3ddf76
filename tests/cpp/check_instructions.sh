#!/bin/sh
# check_instructions.sh KERNEL_CALLS EXPECTED: counts the instructions of the hot kernels with valgrind and compares them
# with the figures of the file EXPECTED, lines of "isa bits param_bits tokens instructions". A figure is instructions per
# thousand weights and token. Fails when one is more than 5% off, in either direction: who saves some writes the new figure down.
set -eu
program=$1
expected=$2

# Instructions of a run that makes the given number of calls.
count() {
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$@" 2>&1 | awk '/Collected/ { print $NF }'
}

status=0
while read -r isa bits param_bits tokens figure; do
  few=$(count "$isa" "$bits" "$param_bits" "$tokens" 1)
  many=$(count "$isa" "$bits" "$param_bits" "$tokens" 5)
  awk -v name="$isa, $bits bits, parameters of $param_bits, $tokens tokens" -v total="$((many - few))" -v tokens="$tokens" -v figure="$figure" '
    BEGIN {
      measured = 1000 * total / (4 * 256 * 1024 * tokens)
      good = measured > 0.95 * figure && measured < 1.05 * figure
      printf "%s: %.1f instructions per thousand weights, expected %.1f%s\n", name, measured, figure, good ? "" : " FAILED"
      exit !good
    }' || status=1
done <"$expected"
exit $status
