#!/usr/bin/env bash
# DeepSeek-R1 on two machines of 8 GPUs over plain ssh, from the first of them: starts the ranks of both, and ends both
# when this script ends. dsengine is installed, and the checkpoint downloaded, at the same place on both.
#
#   ./two_nodes.sh ADDRESS_OF_THIS_MACHINE HOST_OF_THE_OTHER [MORE FLAGS OF dsengine serve]
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: $0 ADDRESS_OF_THIS_MACHINE HOST_OF_THE_OTHER [FLAGS]" >&2
    exit 2
fi
address=$1
other=$2
shift 2
model=${MODEL:-deepseek-ai/DeepSeek-R1}
dsengine=${DSENGINE:-dsengine}
common=("$model" --tp-size 16 --attn-dp-size 16 --ep-size 16 --nnodes 2 --dist-init-addr "$address:20000" "$@")

# With a terminal (-tt) the other machine's ranks get a hang-up when the connection ends, however it does.
# shellcheck disable=SC2029  # expanded here on purpose
ssh -tt -o ServerAliveInterval=15 "$other" "$(printf '%q ' "$dsengine" serve "${common[@]}" --node-rank 1)" </dev/null &
remote=$!
trap 'kill "$remote" 2>/dev/null || true' EXIT

"$dsengine" serve "${common[@]}" --node-rank 0 --host "$address" --port 30000
