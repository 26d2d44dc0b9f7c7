#!/bin/bash
# One run on several Slurm nodes: a process for each GPU, saved before its time is over, then resumed
#
# Command:  sbatch slurm.sh CONFIG [KEY=VALUE ...]
#           RUN=/shared/runs/mine sbatch slurm.sh mine.yaml train.steps=1000
# Change:   the lines with #SBATCH. RUN and the data lie where every node sees them.
# Status:   parsed and dry-run with stand-ins for srun and scontrol; no cluster has run it yet.
#SBATCH --job-name=jaxdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG [KEY=VALUE ...]}
shift
run=${RUN:-runs/slurm-$SLURM_JOB_ID}

# JAX finds the other processes by Slurm's own variables, and gives each the GPU of its number.
if [ -f "$run/RUN.json" ]; then
  command=(jaxdistill resume "$run")
else
  command=(jaxdistill train "$config" "run.dir=$run" "mesh.processes=$SLURM_NTASKS" "$@")
fi
code=0
srun --kill-on-bad-exit=1 "${command[@]}" || code=$?

# 75: asked to stop, with its work saved. 8: a node was lost; the last checkpoint is whole.
if [ "$code" = 75 ] || [ "$code" = 8 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
