#!/bin/bash
# A Megatron launch script with the plugin added: a 345M GPT on one node. Three lines make the
# difference; each is marked with "tokscale". Copy them into your own script.
#
#   megatron-tokscale probe build --data-path web_text_document --split 969,30,1 --seq-length 1024 \
#       --vocab-size 50257 --eod 50256 --out probe.safetensors
#   MEGATRON=Megatron-LM examples/train_gpt.sh RUN web_text_document probe.safetensors
#
# The losses go to RUN/tokscale. Started again, the job resumes and takes no probe twice.

set -euo pipefail

CHECKPOINT_PATH=${1:?usage: $0 RUN DATA_PATH PROBE_SET}
DATA_PATH=${2:?usage: $0 RUN DATA_PATH PROBE_SET}
PROBE_SET=${3:?usage: $0 RUN DATA_PATH PROBE_SET}

export CUDA_DEVICE_MAX_CONNECTIONS=1

DISTRIBUTED_ARGS=(
    --nproc_per_node ${GPUS_PER_NODE:-8}
    --nnodes 1
    --master_addr localhost
    --master_port 6000
)

MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 1024
    --max-position-embeddings 1024
)

TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 64
    --train-iters 100000
    --lr 1.5e-4
    --min-lr 1.5e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --weight-decay 0.1
    --clip-grad 1.0
    --bf16
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 1
)

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --split 969,30,1
    --tokenizer-type GPT2BPETokenizer
    --vocab-file "${VOCAB_FILE:-gpt2-vocab.json}"
    --merge-file "${MERGE_FILE:-gpt2-merges.txt}"
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 100
    --save-interval 1000
    --eval-interval 1000
    --eval-iters 10
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --tensorboard-dir "$CHECKPOINT_PATH/tensorboard"
)

TOKSCALE_ARGS=(--tokscale-probe-set "$PROBE_SET") # tokscale: 1, watch these tokens

LAUNCH=(
    torchrun "${DISTRIBUTED_ARGS[@]}"
    -m megatron_tokscale.run # tokscale: 2, start your script through the plugin
    "${MEGATRON:-Megatron-LM}/pretrain_gpt.py"
    "${MODEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${EVAL_AND_LOGGING_ARGS[@]}"
    "${TOKSCALE_ARGS[@]}" # tokscale: 3, pass the plugin's flags
)
"${LAUNCH[@]}"
