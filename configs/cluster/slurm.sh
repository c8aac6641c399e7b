#!/bin/bash
# Slurm: one Ray for the job, its head on the first node, the run, and the end of all of it. From the project's folder:
#   sbatch configs/cluster/slurm.sh --config configs/brca.yaml --embeddings cells.npy --output.folder runs/brca
#   tail -F zoomldm-JOBID.log
#   scancel JOBID                                          the same sbatch command continues the run
# Needed on every node, at the same path: the project with its .venv (a shared file system). Edit the lines marked EDIT.
# A lost node or the end of the time limit puts the job back into the queue, and it continues.
# Tried with stand-ins for srun, scontrol and ray only, never under Slurm: docs/how-to/run_on_a_cluster.md.
#SBATCH --job-name=zoomldm
#SBATCH --output=zoomldm-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2                # EDIT
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4        # EDIT
#SBATCH --cpus-per-task=16       # EDIT
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00          # EDIT
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

project=${ZOOMLDM_HOME:-$SLURM_SUBMIT_DIR}   # Slurm runs a copy of this script elsewhere
export PATH="$project/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0
# Others on the machines must not run code in this Ray: one token for this job, which srun hands to every node.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# srun takes no CPUs over from sbatch since Slurm 22.05.
cpus=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$cpus
ulimit -n "$(ulimit -Hn)" || true

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node. EDIT: set ZOOMLDM_HEAD_IP where the first of its addresses is not the nodes' own.
ip=${ZOOMLDM_HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
port=$((20000 + SLURM_JOB_ID % 10000))   # above Ray's worker ports, and two jobs on one node do not meet
address=$ip:$port

steps=()
driver=
requeue=
finish() {
    trap - EXIT
    trap '' TERM INT USR1
    # srun hands the signal on, and `ray start --block` then ends its node.
    for pid in "${steps[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    wait
}
stop_driver() { if [[ -n $driver ]]; then kill -TERM "$driver" 2>/dev/null || true; else exit 143; fi; }
trap finish EXIT
trap stop_driver TERM INT
trap 'requeue=yes; stop_driver' USR1   # the time limit is near

on_node() { srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}" & steps+=("$!"); }

on_node "${nodes[0]}" ray start --head --block --node-ip-address="$ip" --port="$port" --num-cpus="$cpus" \
    --disable-usage-stats
tries=60
until ray health-check --address "$address" > /dev/null 2>&1; do
    if (( --tries == 0 )) || ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "slurm.sh: Ray's head must answer at $address (${nodes[0]}); it does not. Its last words are above." >&2
        exit 1
    fi
    sleep 2
done
for node in "${nodes[@]:1}"; do
    on_node "$node" ray start --block --address="$address" --num-cpus="$cpus" --disable-usage-stats
done

# In the background, so that signals are answered at once.
python "$project/generate_large.py" --ray.address "$address" "$@" &
driver=$!
while kill -0 "$driver" 2>/dev/null; do
    wait "$driver" || true   # a signal ends it early, while the driver is still leaving
done
status=0
wait "$driver" || status=$?
if [[ -n $requeue && $status -eq 143 ]]; then   # interrupted by the time limit, neither done nor failed
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
