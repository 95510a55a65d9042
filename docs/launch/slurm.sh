#!/bin/bash
# Supervised fine-tuning on 2 nodes of 8 GPUs under SLURM. Start it, and start it again to go on with a run:
#     MODEL=/models/llama DATA=/data/chats.jsonl OUT=/shared/runs/sft sbatch docs/launch/slurm.sh
# MODEL, DATA and OUT lie on a file system that all nodes see; submit from the repository, its .venv installed with
# `pip install -e ".[cuda12]"`.
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one process a GPU: under SLURM, JAX gives each process the GPU of its local number
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300          # 5 minutes before the time is over: the run saves its state and ends
#SBATCH --requeue                  # SLURM may start the job again after a preemption or the loss of a node
#SBATCH --open-mode=append         # and what is printed then is added to the same file
#SBATCH --output=%x-%j.out

set -euo pipefail

# A folder that holds a run is gone on with; else a run is begun there.
resume=()
if [ -f "$OUT/config.json" ]; then resume=(--resume); fi

# SLURM tells every process who takes part, so no address is given.
# --kill-on-bad-exit: when one process fails, the others are ended at once.
# --gpu-bind=none: every process sees all GPUs of its node, and JAX picks its own.
# The mesh: rows over the 2 nodes, parameters over the 8 GPUs of each.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    .venv/bin/python experiments/sft.py --model "$MODEL" --data "$DATA" --out "$OUT" --dtype bfloat16 \
    --mesh data=2,fsdp=8 --batch-size 64 --save-every 200 "${resume[@]}"
