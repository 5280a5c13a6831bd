# Sourced by the scripts of this folder on every node's behalf: Python, caches, network. Adapt it to your cluster once.

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# just-in-time builds, on a disk of the node: home directories are slow, and shared by nodes of different kinds
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/ilvr-$UID/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/ilvr-$UID/triton}
# nodes without the internet, or a thousand ranks that ask for the same model: download it before
# export HF_HUB_OFFLINE=1

# Network. NCCL finds InfiniBand and NVLink by itself; where it does not, these are the usual answers.
# export NCCL_DEBUG=INFO              # says what it found: look for NET/IB, and for NET/Socket, which is slow
# export NCCL_SOCKET_IFNAME=ib0       # interface of the first handshake
# export GLOO_SOCKET_IFNAME=ib0       # the same for what ranks exchange over the host
# export NCCL_IB_HCA=mlx5             # which cards
# export NCCL_IB_GID_INDEX=3          # RoCE v2
# export FI_PROVIDER=efa              # Amazon; needs the aws-ofi-nccl plug-in

# Compile once on each node, before many ranks want it at once.
prepare_nodes() {
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 python3 -c 'from ilvr_ds.ops import build; build.load()'
}

# Whether every node of the job can still start a process.
nodes_answer() {
  timeout 30 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}
