#!/usr/bin/env bash
# A run on several hosts of a Slurm cluster: one process a host, on all GPUs of the host.
#
#   DPPA_JAX_ENVIRONMENT=venv sbatch launch/slurm.sh --flagfile=configs/merge3.cfg --factors=1.8,1.3 \
#     --coefficient=0.5 --evaluate= --workdir=/shared/runs --output=/shared/merged
#
# Hardware: 2 hosts of 8 GPUs, as the lines below ask for. Without GPUs, leave --gpus-per-node out.
# How to start: as above, from the repository's root; flags after the script's name are the program's, and
#   DPPA_JAX_ENVIRONMENT is a virtual environment with dppa_jax and jax[cuda13] that all hosts see.
# What to edit: hosts, GPUs, cores and time below; --partition and --account, as your cluster wants them.
#   --output and --workdir must be on a file system that all hosts share.
#
# slurm-JOB.log has all output, each line with the number of its process. Two minutes before the time is over, and when a
# host is lost or the job preempted, the job goes back to the queue, and goes on where it was when it starts again.
# In a container: srun --container-image=IMAGE (Pyxis) or srun ... apptainer exec --nv IMAGE python ...
# Not run on a cluster: a test runs it with stand-ins for srun and scontrol.
#
#SBATCH --job-name=dppa_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

export PATH="${DPPA_JAX_ENVIRONMENT:-$PWD/venv}/bin:$PATH"

# Under Slurm, JAX gives the n-th process of a host the n-th GPU alone, unless it is told.
if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
  JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
  export JAX_LOCAL_DEVICE_IDS
fi

# What processes tell each other carries a code that is made with this secret; srun hands it on without showing it.
DPPA_JAX_SECRET="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
export DPPA_JAX_SECRET

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# In the background, as bash runs a trap only when what it waits for in the foreground has ended.
srun --export=ALL --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python -m dppa_jax.launch --coordinator=auto "$@" &
wait $!
