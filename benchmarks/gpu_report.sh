#!/usr/bin/env bash
# All that needs a GPU, in one call of under ten minutes and without a network:
#
#   benchmarks/gpu_report.sh --out DIR             build, tests, compute-sanitizer, launch counts, CUDA graphs, benchmarks
#   benchmarks/gpu_report.sh --out DIR --quick     the same with the fewest cases
#   benchmarks/gpu_report.sh --out DIR --rehearse  without a GPU: the same steps on what stands in for one
#
# Needs python3 with torch, torchvision, pytest, hypothesis and ninja, nvcc, and compute-sanitizer.
# Writes DIR/gpu_report.json, a log per step and the benchmarks' own JSON; prints a table last. Exit status 0: all passed.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_report.py" "$@"
