#!/bin/bash
# A 6B model on 300B tokens, TP4 x PP4, watched by a probe of a million held-out tokens. Run it on
# every node, with NODE_RANK set (under Slurm: sbatch examples/slurm/train_6b.sbatch ...).
#
#   MEGATRON=Megatron-LM TOKENIZER=tokenizer NODE_RANK=0 MASTER_ADDR=node0 \
#       examples/train_6b.sh RUN WEIGHT PREFIX [WEIGHT PREFIX ...]
#
# ACTION=build makes the probe set, ACTION=cost prints what the probes cost, ACTION=doctor prints what
# would be refused: run each once, on any machine that sees the files. ACTION=train (the default)
# trains; started again it resumes. ACTION=replay probes the checkpoints of a finished run.
#
# To train under a data plan: REFERENCE=OTHER ACTION=score scores the training documents by a fitted
# run that watched some of them, PLAN=plan.json ACTION=plan makes the plan, ACTION=prepare makes
# the plan's files (else the job's rank 0 makes them while all GPUs wait), and PLAN=plan.json beside
# ACTION=doctor or train follows it. A run has one plan; without PLAN the blend is Megatron's.

set -euo pipefail

RUN=${1:?usage: $0 RUN WEIGHT PREFIX ...}
shift
DATA=("$@")
ACTION=${ACTION:-train}
PROBE=${PROBE:-$RUN/probe.safetensors}
VOCAB_SIZE=${VOCAB_SIZE:-128256}
EOD=${EOD:-128001}
SPLIT=969,30,1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-16}
GLOBAL_BATCH=1024
SEQ_LENGTH=4096
STEPS=71525

export CUDA_DEVICE_MAX_CONNECTIONS=1

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank ${NODE_RANK:-${SLURM_NODEID:-0}}
    --master_addr ${MASTER_ADDR:-localhost}
    --master_port ${MASTER_PORT:-6000}
)

SHAPE_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 10240
    --num-attention-heads 32
    --num-query-groups 8
    --swiglu
    --seq-length $SEQ_LENGTH
)

MODEL_ARGS=(
    "${SHAPE_ARGS[@]}"
    --group-query-attention
    --max-position-embeddings $SEQ_LENGTH
    --position-embedding-type rope
    --rotary-base 500000
    --normalization RMSNorm
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

TRAINING_ARGS=(
    --micro-batch-size 2
    --global-batch-size $GLOBAL_BATCH
    --train-iters $STEPS
    --lr 3e-4
    --min-lr 3e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --weight-decay 0.1
    --clip-grad 1.0
    --adam-beta2 0.95
    --bf16
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 4
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

DATA_ARGS=(
    --data-path "${DATA[@]}"
    --split $SPLIT
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-tokenizer}"
    --dataloader-type single
)

SAVING_AND_LOGGING_ARGS=(
    --save "$RUN"
    --load "$RUN"
    --save-interval 500
    --eval-interval 1000
    --eval-iters 10
    --log-interval 10
    --tensorboard-dir "$RUN/tensorboard"
    --exit-signal-handler
)

PROBE_SCHEDULE=log:per-octave=12+last

TOKSCALE_ARGS=(
    --tokscale-probe-set "$PROBE"
    --tokscale-probe-schedule $PROBE_SCHEDULE
    --tokscale-probe-at-exit
)

if [[ -n ${PLAN:-} ]]; then
    TOKSCALE_ARGS+=(--tokscale-plan "$PLAN")
fi

SCRIPT=${MEGATRON:-Megatron-LM}/pretrain_gpt.py
JOB=(
    "$SCRIPT" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}" "${SAVING_AND_LOGGING_ARGS[@]}" "${TOKSCALE_ARGS[@]}"
)

case $ACTION in
build)
    megatron-tokscale probe build --data-path "${DATA[@]}" --split $SPLIT --seq-length $SEQ_LENGTH \
        --vocab-size "$VOCAB_SIZE" --eod "$EOD" --tokens 1000000 --report-duplicates --out "$PROBE"
    ;;
cost)
    megatron-tokscale probe cost --probe-set "$PROBE" "${SHAPE_ARGS[@]}" --vocab-size "$VOCAB_SIZE" \
        --global-batch-size $GLOBAL_BATCH --train-iters $STEPS \
        --tokscale-probe-schedule $PROBE_SCHEDULE
    ;;
score)
    megatron-tokscale score "${REFERENCE:?give the fitted reference run}" --data-path "${DATA[@]}" \
        --split $SPLIT
    ;;
plan)
    megatron-tokscale plan build frontier --data-path "${DATA[@]}" --split $SPLIT \
        --seq-length $SEQ_LENGTH --train-samples $((GLOBAL_BATCH * STEPS)) \
        --out "${PLAN:?give the file to write}"
    ;;
prepare) megatron-tokscale plan prepare -- "${JOB[@]}" ;;
doctor) megatron-tokscale doctor -- "${JOB[@]}" ;;
train) torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tokscale.run "${JOB[@]}" ;;
replay)
    torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tokscale.run "${JOB[@]}" --tokscale-replay "$RUN"
    ;;
*)
    echo "$0: ACTION=$ACTION is unknown; give build, cost, score, plan, prepare, doctor, train or replay" >&2
    exit 2
    ;;
esac
