#!/usr/bin/env bash
# Everything in this folder that needs no GPU, once more:
#
#   SNNBENCH_DATA=~/data bash results/rerun.sh [FOLDER] [OPTIONS OF snnbench run]
#   SUITES="digits-events smoke" bash results/rerun.sh      # some of them; these two need no data
#
# FOLDER is where the results go (default: rerun). Fashion-MNIST and CIFAR-10 must be below
# SNNBENCH_DATA (snnbench data fetch NAME). What is done already is not done again:
# stop it whenever you like, and go on with the same command. Times mean something only on a machine
# that does nothing else.
set -euo pipefail
out=${1:-rerun}
shift || true

all="fashion-mnist-small cifar10-small digits-events scaling smoke peers"
for suite in ${SUITES:-$all}; do
  if [ "$suite" = peers ]; then
    snnbench peers --output "$out/peers"
    continue
  fi
  folder=$out/$suite name=$suite
  if [ "$suite" = scaling ]; then folder=$out/scaling-cpu name=scaling-cpu; fi
  # Exit code 1: some runs failed. The report shows them, and the other suites are done nevertheless.
  snnbench run "$suite" --set "name=$name" --results "$out" "$@" || [ $? = 1 ]
  snnbench report "$folder" --format md -o "$folder/report.md"
  case $suite in
    smoke) figures=() ;;
    scaling) figures=(saved step peak) ;;
    *) figures=(pareto-memory pareto-sops curves layers) ;;
  esac
  for figure in "${figures[@]}"; do
    snnbench plot "$figure" "$folder" -o "$folder/$figure.png"
  done
done
