#!/bin/bash
# Two nodes with 8 GPUs each: `sbatch launch/slurm.sh my.yaml`. One launcher a node starts a process for each GPU.
# SIGTERM comes five minutes before the time limit: the run saves a checkpoint, and the job's next start goes on there.
#SBATCH --job-name=flash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

recipe=${1:?name a recipe: sbatch launch/slurm.sh my.yaml}
export HF_HOME=$SCRATCH/huggingface OMP_NUM_THREADS=8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m flash_diffusion.trainer distill "$recipe" --output "$SCRATCH/my-lora" --resume
