#!/usr/bin/env bash
# Everything in this folder that needs no GPU, once more:
#
#   SNNBENCH_DATA=~/data bash results/rerun.sh [FOLDER] [OPTIONS OF snnbench run]
#
# FOLDER is where the results go (default: rerun). Fashion-MNIST and CIFAR-10 must be below
# SNNBENCH_DATA (snnbench data fetch fashion-mnist cifar10). What is done already is not done again:
# stop it whenever you like, and go on with the same command. Times mean something only on a machine
# that does nothing else.
set -euo pipefail
out=${1:-rerun}
shift || true

for suite in fashion-mnist-small cifar10-small digits-events scaling smoke; do
  folder=$out/$suite name=$suite
  if [ "$suite" = scaling ]; then folder=$out/scaling-cpu name=scaling-cpu; fi
  snnbench run "$suite" --set "name=$name" --results "$out" "$@"
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
snnbench peers --output "$out/peers"
