#!/bin/bash
# One run on all hosts of a Cloud TPU pod slice: the same command on each, again until it is done
#
# Command:  TPU=my-slice ZONE=us-east5-a RUN=/mnt/shared/runs/mine tpu_pod.sh mine.yaml
# Before:   every host has the tool (`pip install "jaxdistill[tpu]"`), the configuration, and a disk
#           that all of them mount for RUN and the data.
# Status:   parsed and dry-run with a stand-in for gcloud; no TPU has run it yet.
set -euo pipefail

config=${1:?usage: TPU=NAME ZONE=ZONE RUN=FOLDER tpu_pod.sh CONFIG [KEY=VALUE ...]}
shift
tpu=${TPU:?the name of the slice} zone=${ZONE:?its zone} run=${RUN:?a folder that all hosts mount}
attempts=${ATTEMPTS:-10}

# Hosts find each other by the slice's own metadata.
train=$(printf '%q ' jaxdistill train "$config" "run.dir=$run" "$@")
resume=$(printf '%q ' jaxdistill resume "$run")
exists=$(printf '%q ' test -f "$run/RUN.json")

on_all() {
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$1"
}

# Asked once and of one host: the others must not see the folder that the first of them makes.
begun() {
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=0 --command="$exists"
}

for _ in $(seq "$attempts"); do
  code=0
  if begun; then on_all "$resume" || code=$?; else on_all "$train" || code=$?; fi
  # 75: asked to stop, with its work saved. 8: a host was lost; the last checkpoint is whole.
  if [ "$code" != 75 ] && [ "$code" != 8 ]; then exit "$code"; fi
done
exit "$code"
