#!/bin/bash
# Trains on several machines under SLURM, one worker a machine, each with all of its GPUs:
#
#   sbatch --nodes=8 training/cluster/slurm.sh --recipe=tnt_small --data_dir=/shared/tfds
#
# The machines need the repository, its .venv, the data and runs/ on a file system that they share.
# A job that is stopped, or runs out of time, goes on from its last checkpoint in the next one:
# SLURM sends SIGTERM ten minutes before the end, and the same job is queued again.
#SBATCH --job-name=keras-tnt
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# The trainer finds its cluster in what srun tells each task. The trainer ends with status 143 after
# a SIGTERM, with a checkpoint written.
status=0
srun --kill-on-bad-exit=1 .venv/bin/python training/train.py \
    --strategy=multi_worker --precision=bfloat16 \
    --workdir="${WORKDIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}" "$@" || status=$?
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
