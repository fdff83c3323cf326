#!/bin/bash
# A training job on the demo's data, as a launch script in Megatron's own style: a small GPT on a CPU
# in two pipeline stages, watched by the probe. `make demo` (or `megatron-tokscale demo`) makes the data.
#
#   examples/train_demo.sh RUN [DEMO]
#
# --tokscale-cpu and `-m megatron_tokscale.pretrain` stand in for a GPU and a Megatron checkout; a job
# that has both is examples/train_gpt.sh.

set -euo pipefail

CHECKPOINT_PATH=${1:?usage: $0 RUN [DEMO]}
DEMO=${2:-demo-run}

GPUS_PER_NODE=2 # processes, as there is no GPU
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

export OMP_NUM_THREADS=1

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR
    --master_port $MASTER_PORT
)

MODEL_ARGS=(
    --num-layers 4
    --hidden-size 128
    --num-attention-heads 4
    --seq-length 128
    --max-position-embeddings 128
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 16
    --train-iters 256
    --lr 2e-3
    --min-lr 2e-3
    --lr-decay-style constant
    --lr-warmup-iters 32
    --weight-decay 0.1
    --clip-grad 1.0
    --adam-beta2 0.95
)

MODEL_PARALLEL_ARGS=(
    --pipeline-model-parallel-size 2
)

DATA_ARGS=(
    --data-path 0.5 "$DEMO/data/speeches" 0.5 "$DEMO/data/python"
    --split 90,10,0
    --data-cache-path "$DEMO/cache"
    --tokenizer-type NullTokenizer
    --vocab-size 2048
    --num-workers 0
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 16
    --eval-interval 256
    --eval-iters 4
    --save-interval 64
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --ckpt-format torch
)

TOKSCALE_ARGS=(
    --tokscale-cpu
    --tokscale-probe-set "$DEMO/probe.safetensors"
    --tokscale-probe-schedule log:per-octave=8+last
    # --tokscale-plan "$DEMO/plan.json"
)

torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tokscale.pretrain \
    "${MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "${TOKSCALE_ARGS[@]}"
