#!/bin/bash
# Supervised fine-tuning on a TPU slice of several hosts, here 16 chips of v5e on 4 hosts. Run it from the repository:
#     TPU_NAME=sft ZONE=europe-west4-b bash docs/launch/tpu_pod.sh create    # the slice, with the package on all hosts
#     TPU_NAME=sft ZONE=europe-west4-b bash docs/launch/tpu_pod.sh run       # again to go on with an interrupted run
#     TPU_NAME=sft ZONE=europe-west4-b bash docs/launch/tpu_pod.sh delete    # it costs money until then
# MODEL, DATA and OUT are paths on the hosts, on a file system that all of them mount (such as NFS by Filestore).
set -euo pipefail

: "${TPU_NAME:?name of the slice}" "${ZONE:?zone it is in, such as europe-west4-b}"
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
MODEL=${MODEL:-/mnt/runs/models/llama}
DATA=${DATA:-/mnt/runs/data/chats.jsonl}
OUT=${OUT:-/mnt/runs/sft}

# The same command on every host, at the same time: that is what makes them one run.
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
    gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
    # Only what is installed: a .venv of this machine would not work there.
    copy=$(mktemp -d)
    git archive --prefix=rlhf_jax/ HEAD | tar -x -C "$copy"
    gcloud compute tpus tpu-vm scp --recurse --zone="$ZONE" --worker=all "$copy/rlhf_jax" "$TPU_NAME":
    # uv brings a Python of its own: that of the image is too old.
    on_all_hosts 'cd rlhf_jax && python3 -m pip install --user uv && export PATH="$HOME/.local/bin:$PATH" &&
        uv venv --python 3.11 .venv && uv pip install -e ".[tpu]"'
    ;;
run)
    # The hosts know one another from the metadata of the slice, so no address is given. On hosts of one slice all chips
    # are on one fast network: the mesh may cut them as it likes.
    on_all_hosts "cd rlhf_jax && resume= && if [ -f '$OUT/config.json' ]; then resume=--resume; fi
        .venv/bin/python experiments/sft.py --model '$MODEL' --data '$DATA' --out '$OUT' --dtype bfloat16 \
            --mesh data=2,fsdp=8 --batch-size 64 --save-every 200 \$resume"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE"
    ;;
*)
    echo "usage: TPU_NAME=… ZONE=… bash docs/launch/tpu_pod.sh create|run|delete" >&2
    exit 2
    ;;
esac
