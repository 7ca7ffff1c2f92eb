#!/bin/bash
# sbatch slurm.sh; see "Slurm" in gac_plugin/training/README.md
#SBATCH --job-name=gac
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun for each machine, which starts the processes there
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120        # to this script, 120 seconds before the limit: time to save
#SBATCH --requeue                  # start again after a preemption or a node's failure
#SBATCH --open-mode=append         # and keep the log
#SBATCH --output=gac-%j.log

set -u
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds that torchrun gives a stopped process; its own default is 30

stopped=false
trap 'stopped=true; kill -TERM "$steps"' TERM  # srun passes it to torchrun, and that to the processes

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    --rdzv-id "$SLURM_JOB_ID" \
    -m gac_plugin.train \
    --dataset cifar10 \
    --output-dir "${SLURM_SUBMIT_DIR:-.}/runs/cifar10" \
    --mixed-precision bf16 \
    --checkpoint-every 1000 \
    --resume auto &
steps=$!

wait "$steps"
code=$?
if [ "$stopped" = true ]; then  # the trap has cut that wait short
    wait "$steps"
    echo "stopped before the limit; back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
