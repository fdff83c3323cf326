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
# To train under a data plan, with RUN, the weights and the prefixes as above (docs/guides/plan.md):
#
#   ACTION=build                                     $0 REF ...    any probe set, for the next line
#   SIZE=reference                                   $0 REF ...    a small run on the same data
#   ACTION=unseen REFERENCE=REF PROBE=unseen         $0 RUN ...    documents that it has not drawn
#   SIZE=reference ACTION=replay PROBE=unseen        $0 REF ...    their losses at its checkpoints
#   ACTION=score REFERENCE=REF                       $0 RUN ...    the falls of all documents
#   ACTION=plan PLAN=plan.json                       $0 RUN ...    the plan, and what it can gain
#   ACTION=strata PLAN=plan.json STRATA=strata       $0 RUN ...    documents that the plan keeps out
#   ACTION=prepare PLAN=plan.json                    $0 RUN ...    the plan's files, without a GPU
#   PLAN=plan.json STRATA=strata                     $0 RUN ...    trains, and corrects the weights
#
# Without STRATA the weights stay as planned; without PLAN the blend is Megatron's. A run has one plan.

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
case ${SIZE:-6b} in
6b) STEPS=71525 LAYERS=32 HIDDEN=4096 FFN=10240 HEADS=32 ;;
reference) STEPS=20000 LAYERS=16 HIDDEN=1024 FFN=2816 HEADS=16 ;;
*) echo "$0: SIZE=$SIZE is unknown; give 6b or reference" >&2 && exit 2 ;;
esac

export CUDA_DEVICE_MAX_CONNECTIONS=1

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank ${NODE_RANK:-${SLURM_NODEID:-0}}
    --master_addr ${MASTER_ADDR:-localhost}
    --master_port ${MASTER_PORT:-6000}
)

SHAPE_ARGS=(
    --num-layers $LAYERS
    --hidden-size $HIDDEN
    --ffn-hidden-size $FFN
    --num-attention-heads $HEADS
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
if [[ $ACTION == replay ]]; then
    PROBE_SCHEDULE=checkpoints # next to none of them is at a step of the other schedule
fi

TOKSCALE_ARGS=(
    --tokscale-probe-set "$PROBE" ${STRATA:+"$STRATA"}
    --tokscale-probe-schedule $PROBE_SCHEDULE
    --tokscale-probe-at-exit
)

if [[ -n ${PLAN:-} ]]; then
    TOKSCALE_ARGS+=(--tokscale-plan "$PLAN" ${STRATA:+--tokscale-replan-interval $((STEPS / 20))})
fi

SCRIPT=${MEGATRON:-Megatron-LM}/pretrain_gpt.py
JOB=(
    "$SCRIPT" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}" "${SAVING_AND_LOGGING_ARGS[@]}" "${TOKSCALE_ARGS[@]}"
)

BUILD=(
    probe build --data-path "${DATA[@]}" --split $SPLIT --seq-length $SEQ_LENGTH
    --vocab-size "$VOCAB_SIZE" --eod "$EOD" --out "$PROBE"
)

case $ACTION in
build) megatron-tokscale "${BUILD[@]}" --tokens 1000000 --report-duplicates ;;
unseen)
    megatron-tokscale "${BUILD[@]}" --tokens 4000000 --part train \
        --unseen-by "${REFERENCE:?give the reference run}"
    ;;
cost)
    megatron-tokscale probe cost --probe-set "$PROBE" "${SHAPE_ARGS[@]}" --vocab-size "$VOCAB_SIZE" \
        --global-batch-size $GLOBAL_BATCH --train-iters $STEPS \
        --tokscale-probe-schedule $PROBE_SCHEDULE
    ;;
score)
    megatron-tokscale score "${REFERENCE:?give the reference run}/replay" --data-path "${DATA[@]}" \
        --split $SPLIT
    ;;
plan)
    megatron-tokscale plan build fall --data-path "${DATA[@]}" --split $SPLIT \
        --seq-length $SEQ_LENGTH --train-samples $((GLOBAL_BATCH * STEPS)) \
        --parameters 6000000000 --held-out 64 --out "${PLAN:?give the file to write}"
    ;;
strata)
    megatron-tokscale probe build --plan "${PLAN:?give the plan}" --eod "$EOD" \
        --out "${STRATA:?give the file to write}"
    ;;
prepare) megatron-tokscale plan prepare -- "${JOB[@]}" ;;
doctor) megatron-tokscale doctor -- "${JOB[@]}" ;;
train) torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tokscale.run "${JOB[@]}" ;;
replay)
    torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tokscale.run "${JOB[@]}" --tokscale-replay "$RUN" \
        --tokscale-dir "$RUN/replay"
    ;;
*)
    echo "$0: ACTION=$ACTION is unknown; give build, cost, unseen, score, plan, strata, prepare, doctor, train or replay" >&2
    exit 2
    ;;
esac
