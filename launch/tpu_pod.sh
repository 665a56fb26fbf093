#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, one process a host.
#
#   launch/tpu_pod.sh create   # asks for the slice and waits until it is there
#   launch/tpu_pod.sh install  # the repository's last commit, on all hosts
#   launch/tpu_pod.sh run --flagfile=configs/merge3.cfg --factors=1.8,1.3 --coefficient=0.5 --evaluate= \
#     --workdir=/mnt/shared/runs --output=/mnt/shared/merged
#   launch/tpu_pod.sh delete   # the slice costs until then
#
# Hardware: as ACCELERATOR says; v5litepod-16 is 16 chips on 4 hosts.
# How to start: as above, from the repository's root, with gcloud logged in and `ssh-add ~/.ssh/google_compute_engine`
#   done. Flags after `run` are the program's. A run lives as long as its connection (tmux helps); `stop` ends one that
#   was left behind, `logs` shows the last lines of each host's dppa_jax.log, and the same command goes on where it was.
# What to edit: the variables below. SHARED is an NFS export, for example of Filestore, in the slice's network: --output
#   and --workdir must be on a file system that all hosts share. For spot capacity add --spot to `create`.
#
# Not run on a TPU: a test runs it with a stand-in for gcloud.
set -euo pipefail

NAME="${NAME:-dppa-jax}"
ZONE="${ZONE:-us-west4-a}"
ACCELERATOR="${ACCELERATOR:-v5litepod-16}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"
SHARED="${SHARED:-10.0.0.2:/shared}"
MOUNT="${MOUNT:-/mnt/shared}"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME"
  local state=""
  until [[ "$state" == ACTIVE ]]; do
    sleep 30
    state="$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')"
    echo "$NAME: $state"
    if [[ "$state" == FAILED || "$state" == SUSPENDED ]]; then
      return 1
    fi
  done
}

# The hosts' own Python is older than dppa_jax asks for, so uv brings one. The hosts' pip takes uv from PyPI, and no file
# of another checksum; uv itself knows the checksum of each Python. For another version: pip download, then pip hash.
UV="uv==0.13.9 --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19" # of x86-64

# What processes tell each other carries a code that is made with a secret. It travels as a file that only its user
# reads, as everyone on a host can see command lines.
install() {
  local archive secret
  archive="$(mktemp)"
  secret="$(mktemp)"
  git archive --format=tar.gz --prefix=dppa_jax/ --output="$archive" HEAD
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$secret"
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:dppa_jax.tar.gz" --zone="$ZONE" --worker=all
  gcloud compute tpus tpu-vm scp "$secret" "$NAME:dppa_jax.secret" --zone="$ZONE" --worker=all
  rm "$archive" "$secret"
  on_all_hosts "set -euo pipefail
    chmod 600 dppa_jax.secret
    tar -xzf dppa_jax.tar.gz
    echo '$UV' > uv.txt
    python3 -m pip install --target=uv --upgrade --no-deps --only-binary=:all: --require-hashes --requirement=uv.txt
    uv/bin/uv venv --allow-existing --python=3.12 ~/venv
    uv/bin/uv pip install --python ~/venv 'jax[tpu]' ./dppa_jax
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y nfs-common
    sudo mkdir -p $MOUNT
    mountpoint -q $MOUNT || sudo mount -t nfs $SHARED $MOUNT"
}

run() {
  local flags
  flags="$(printf '%q ' "$@")"
  on_all_hosts "set -o pipefail; cd dppa_jax
    DPPA_JAX_SECRET=\"\$(cat ~/dppa_jax.secret)\" && export DPPA_JAX_SECRET &&
    ~/venv/bin/python -m dppa_jax.launch --coordinator=auto $flags 2>&1 | tee -a ~/dppa_jax.log"
}

logs() {
  on_all_hosts "tail -n 20 ~/dppa_jax.log"
}

stop() {
  on_all_hosts "pkill -TERM -f '[d]ppa_jax.launch' || echo 'nothing runs here'"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

case "${1:-}" in
  create | install | run | logs | stop | delete) "$@" ;;
  *)
    echo "error: ${1:-no command}: give create, install, run FLAGS, logs, stop or delete; see the head of $0" >&2
    exit 2
    ;;
esac
