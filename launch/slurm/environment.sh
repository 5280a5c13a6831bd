# Sourced by the scripts of this folder: Python, caches, network. Adapt it once to your cluster.

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# just-in-time builds, on the node's own disk: home directories are slow, and shared by nodes of different kinds
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/ilvr-$UID/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/ilvr-$UID/triton}
# nodes without internet access: download the model beforehand
# export HF_HUB_OFFLINE=1

# Network. NCCL finds InfiniBand and NVLink by itself; if it does not, these are the usual remedies.
# export NCCL_DEBUG=INFO              # prints what it found: NET/IB is fast, NET/Socket is slow
# export NCCL_SOCKET_IFNAME=ib0       # interface of the bootstrap
# export GLOO_SOCKET_IFNAME=ib0       # the same for communication through host memory
# export NCCL_IB_HCA=mlx5             # which adapters
# export NCCL_IB_GID_INDEX=3          # RoCE v2
# export FI_PROVIDER=efa              # Amazon; needs the aws-ofi-nccl plug-in

# A warning (#SBATCH --signal=B:USR1@300) comes to the script, which remembers it and hands it to what runs: ranks that
# are still starting die of it, one of SIGUSR1 and the others with that one, so that their codes do not tell.
warned='' child=''
trap 'warned=yes; kill -USR1 $child 2>/dev/null || true' USR1

# Run a command, unless there was a warning, and heed one meanwhile; its exit code.
heed() {
  local code=0
  [ -z "$warned" ] || return 138
  "$@" &
  child=$!
  wait $child || code=$?
  while [ $code -gt 128 ] && kill -0 $child 2>/dev/null; do  # the wait ended, not the command
    code=0
    wait $child || code=$?
  done
  return $code
}

# Compile the operators once per node, before many ranks need them at once.
prepare_nodes() {
  heed srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    python3 -c 'from ilvr_ds.ops import build; build.load()'
}

# Exit code after a signal asked to stop and all that is worth keeping is kept; any code that nothing else uses.
stopped=85

# Start the job again if it ended with code $1 because of a warning or another signal; whether that was so. 138: a signal
# to the ranks came before it was heeded. A job that was cancelled meanwhile must not come back.
requeue_if_stopped() {
  # in an array, the last job's SLURM_JOB_ID is that of the whole array
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  { [ "$1" = $stopped ] || [ "$1" = 138 ] || { [ -n "$warned" ] && [ "$1" -gt 128 ]; }; } &&
    [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] && scontrol requeue "$job"
}

# Whether every node of the job can still start a process.
nodes_answer() {
  timeout 30 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}
