"""The settings that the plugin refuses, with the reasons: no number is better than a wrong one.

The tables follow the sources of megatron-core 0.17.1, 0.18.2, 0.19.2 and main (August 2026). These
settings are safe, and are not refused: `--cuda-graph-impl transformer_engine` replays graphs in
training only; a batch size that ramps up keeps the microbatch; `--reset-position-ids` has nothing
to reset in windows of one document; `--logits-load-dir` changes the loss function and not the
losses; the attention logits of `--qk-clip` and `--log-max-attention-logit` are restored after a
probe. Where experts drop tokens (`--moe-expert-capacity-factor`) a token's loss depends on the
microbatch around it. That microbatch is always the same part of the probe set, so losses compare
within a run of one micro-batch size.
"""

import inspect
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan
from megatron_tokscale.probe import ProbeSet


class Refusal(NamedTuple):
    """A flag of Megatron that is refused.

    Attributes:
        flag: the flag, as on the command line.
        reason: reason for the refusal, the end of the message.
        values: the refused values; empty where every value that turns the flag on is refused.
    """

    flag: str
    reason: str
    values: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """The name of the flag's value among the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")

    def applies(self, args: Namespace) -> bool:
        """Return True if `args` has the flag with a refused value."""
        value = getattr(args, self.dest, None)
        if self.values:
            return value in self.values
        return value is not None and value is not False


_GRAPHS: Final = "a captured training step would be replayed, dropout and all"
_PACKED: Final = "its batches are packed, and the probe set's are not"
_RANDOM_ROUTING: Final = "it routes at random, so the losses would be noise"
_UNVERIFIED: Final = "its isolation is not verified"
_YAML: Final = "Megatron then ignores the command line, and the --tokscale flags with it"

_REFUSED_FOR_PROBE: Final = (
    Refusal("--cuda-graph-impl", _GRAPHS, ("local", "full_iteration")),
    Refusal("--enable-cuda-graph", _GRAPHS),
    Refusal("--use-megatron-fsdp", _UNVERIFIED),
    Refusal("--use-torch-fsdp2", _UNVERIFIED),
    Refusal("--sft", _PACKED),
    Refusal("--dataloader-inter-document-masking", _PACKED),
    Refusal("--hybrid-context-parallel", "its batches have another layout"),
    Refusal("--perform-rl-step", "the probe is for pre-training"),
    Refusal("--vision-pretraining", "the probe is for language models"),
    Refusal("--position-embedding-type", "the probe set is text alone", ("mrope",)),
    Refusal("--logits-save-dir", "it puts zeros in the place of the losses"),
    Refusal("--moe-router-force-load-balancing", _RANDOM_ROUTING),
    Refusal("--moe-router-force-biased", _RANDOM_ROUTING),
    Refusal("--moe-expert-rank-capacity-factor", "its overflow handling wraps the forward pass"),
    Refusal("--moe-routing-trace-path", "the trace would record the probe's tokens too"),
    Refusal(
        "--fine-grained-activation-offloading",
        "it plans what to offload from the passes that it sees, a probe among them",
    ),
    Refusal("--fake-process-group", "no losses can be gathered through it"),
    Refusal("--yaml-cfg", _YAML),
)

_REFUSED_FOR_PLAN: Final = (
    Refusal("--mock-data", "there are no documents to choose among"),
    Refusal("--fim-data", "its samples are made while they are read"),
    Refusal("--sft", "its samples are packed while they are read"),
    Refusal("--perform-rl-step", "its samples are rollouts"),
    Refusal("--hybrid-context-parallel", "its sampler orders the samples by length"),
    Refusal("--sequence-packing-scheduler", "it moves samples between data-parallel ranks"),
    Refusal("--yaml-cfg", _YAML),
)

_REFUSED_FOR_SAMPLES: Final = (
    Refusal("--sequence-packing-scheduler", "it moves samples between data-parallel ranks"),
)

_REFUSED_FOR_REPLAYED_STEP: Final = (
    Refusal("--fim-data", "its samples are made while they are read"),
    Refusal("--reset-position-ids", "the probe's forward pass counts positions through a sample"),
    Refusal("--reset-attention-mask", "the probe's forward pass sees a sample as one text"),
)


SKIP_TRAIN: Final = (
    "--skip-train trains nothing, so no probe is taken and no plan is followed; --tokscale-replay "
    "probes saved checkpoints"
)
"""The refusal of a probe set or a plan in a job that only evaluates."""

PARTS_UNKNOWN: Final = (
    "whether the job's --split is the plan's is not known: the plan does not say which documents "
    "it was made for; make it again to have that checked"
)
"""The warning for a plan of an older version, which does not hold its training documents."""


def probe_refusals(args: Namespace) -> list[str]:
    """Return a line for each setting under which a probe would disturb training or be wrong.

    Args:
        args: Megatron's arguments, validated by it or not.
    """
    found = _refusals("the probe", _REFUSED_FOR_PROBE, args)
    decoder_length = getattr(args, "decoder_seq_length", None)
    if args.seq_length is not None and decoder_length not in (None, args.seq_length):
        found.append(
            f"the probe does not support --decoder-seq-length {decoder_length} beside --seq-length "
            f"{args.seq_length}: it is for decoder-only models"
        )
    if _stages_parameters_among_gradients(args):
        found.append(
            "the probe does not support --reuse-grad-buf-for-mxfp8-param-ag with "
            "--overlap-param-gather in this Megatron: its forced gather, before 0.19, takes "
            "gradients for parameters"
        )
    found += [
        f"the probe does not support --{flag} {shards}, more than there are tensor-parallel ranks: "
        f"{_UNVERIFIED}"
        for flag, shards in _weight_shards(args).items()
    ]
    if _uses_modelopt(args):
        found.append(
            "the probe does not support ModelOpt (--export-kd-teacher-load, or a checkpoint of "
            "ModelOpt's in --load): a pipeline may carry a teacher's tensors beside the student's"
        )
    if _has_evaluation_recipe(args):
        found.append(
            f"the probe does not support --te-precision-config-file {args.te_precision_config_file}"
            " with an evaluation_recipe: the losses would be those of another precision than the "
            "training's; drop the evaluation_recipe"
        )
    return found


def group_refusals(given: Sequence[str]) -> list[str]:
    """Return a line if the training script hands process groups of its own to `pretrain`.

    Args:
        given: names of the arguments of `pretrain` that the script gives.
    """
    found = [name for name in ("pg_collection", "p2p_communicator") if name in given]
    if not found:
        return []
    return [
        f"the probe does not support {' and '.join(found)} of the training script's own: it "
        "gathers the losses through Megatron's global process groups; leave them out of the call "
        "of pretrain"
    ]


def plan_refusals(args: Namespace) -> list[str]:
    """Return a line for each setting under which a data plan cannot be followed.

    Args:
        args: Megatron's arguments, validated by it or not.
    """
    found = _refusals("--tokscale-plan", _REFUSED_FOR_PLAN, args)
    if args.dataloader_type not in (None, "single"):
        found.append(
            f"--tokscale-plan needs --dataloader-type single, not {args.dataloader_type}: only "
            "then is sample k the k-th sample of the job"
        )
    return found


def sample_refusals(args: Namespace) -> list[str]:
    """Return a line for each setting under which it is not known which sample a loss is of.

    The refusals of a probe hold too: the flag needs a probe set.
    """
    found = _refusals("--tokscale-sample-losses", _REFUSED_FOR_SAMPLES, args)
    if args.dataloader_type not in (None, "single"):
        found.append(
            f"--tokscale-sample-losses needs --dataloader-type single, not {args.dataloader_type}: "
            "only then is it known which sample a rank trains on"
        )
    return found


def replayed_step_refusals(args: Namespace) -> list[str]:
    """Return a line for each setting under which a step's samples would not be the training's."""
    return _refusals("--tokscale-replay-step", _REFUSED_FOR_REPLAYED_STEP, args)


def probe_set_misfits(
    probe_set: ProbeSet, path: str, seq_length: int | None, vocab_size: int | None
) -> list[str]:
    """Return the reasons why a probe set does not fit a job of this sequence length and vocabulary.

    Args:
        seq_length: sequence length of the job in tokens; None if it is not known.
        vocab_size: vocabulary size of the job's tokenizer, without padding; None if it is not
            known.
    """
    found = []
    if seq_length is not None and probe_set.seq_length != seq_length:
        found.append(
            f"probe set {path} has sequences of {probe_set.seq_length} tokens, the job trains on "
            f"--seq-length {seq_length}; build a probe set for that length"
        )
    if vocab_size is not None and probe_set.vocab_size != vocab_size:
        found.append(
            f"probe set {path} is for a vocabulary of {probe_set.vocab_size}, the job has "
            f"{vocab_size}; build a probe set with the job's tokenizer"
        )
    return found


def repeated_probe_sets(probe_sets: Mapping[str, ProbeSet]) -> list[str]:
    """Return a line for each probe set, by its file, that another file of the job holds too."""
    known: dict[str, str] = {}
    found = []
    for path, probe_set in probe_sets.items():
        first = known.setdefault(probe_set.fingerprint, path)
        if first != path:
            found.append(
                f"probe set {path} is the probe set of {first}; expected each of "
                "--tokscale-probe-set once; drop one"
            )
    return found


def plan_misfits(plan: Plan, path: str, seq_length: int) -> list[str]:
    """Return the reason why a plan does not fit a job of this sequence length."""
    if plan.seq_length == seq_length:
        return []
    return [
        f"plan {path} is for sequence length {plan.seq_length}, the job has --seq-length "
        f"{seq_length}; make a plan for this job"
    ]


def replan_misfits(plan: Plan, path: str) -> list[str]:
    """Return the reason why a job may not change the weights of a plan by the falls of its losses.

    A control of the policy is refused too: compared plans differ in nothing but their weights.
    """
    if plan.provenance.policy != "target":
        return []
    return [
        f"plan {path} is of the policy target, and --tokscale-replan-interval would replace its "
        "weights by others that follow falls; expected a plan of another policy; drop the flag"
    ]


def check_probe(args: Namespace) -> None:
    """Refuse settings under which a probe would disturb training or give wrong losses.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    raise_first(probe_refusals(args))


def check_plan(args: Namespace) -> None:
    """Refuse settings under which a data plan cannot be followed.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    raise_first(plan_refusals(args))


def check_samples(args: Namespace) -> None:
    """Refuse settings under which it is not known which sample a loss is of.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    raise_first(sample_refusals(args))


def check_replayed_step(args: Namespace) -> None:
    """Refuse settings under which a step's samples would not be those of the training.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    raise_first(replayed_step_refusals(args))


def raise_first(refusals: list[str]) -> None:
    """Raise the first refusal, if there is one.

    Raises:
        TokscaleError: its message is the first refusal.
    """
    if refusals:
        raise TokscaleError(refusals[0])


def _refusals(refusing: str, table: tuple[Refusal, ...], args: Namespace) -> list[str]:
    return [
        f"{refusing} does not support {' '.join([refusal.flag, *_value(refusal, args)])}: "
        f"{refusal.reason}"
        for refusal in table
        if refusal.applies(args)
    ]


def _value(refusal: Refusal, args: Namespace) -> list[str]:
    """Return the value to name beside the flag, if only some values are refused."""
    return [str(getattr(args, refusal.dest))] if refusal.values else []


def _stages_parameters_among_gradients(args: Namespace) -> bool:
    """Return whether a forced parameter gather would read a buffer that holds gradients.

    From 0.19 on Megatron first copies the parameters into the buffer, if the optimizer is passed.
    """
    names = ("reuse_grad_buf_for_mxfp8_param_ag", "overlap_param_gather")
    if not all(getattr(args, name, False) for name in names):
        return False
    from megatron.training import training

    return "optimizer" not in inspect.signature(training.force_param_sync).parameters


def _weight_shards(args: Namespace) -> dict[str, int]:
    """Return the flags that cut weights into more shards than tensor parallelism needs."""
    size = getattr(args, "tensor_model_parallel_size", None) or 1
    sizes = {
        "tensor-parallel-num-weight-shards": size,
        "expert-tensor-parallel-num-weight-shards": (
            getattr(args, "expert_tensor_parallel_size", None) or size
        ),
    }
    shards = {flag: getattr(args, flag.replace("-", "_"), None) or 1 for flag in sizes}
    return {flag: n for flag, n in shards.items() if n > sizes[flag]}


def _uses_modelopt(args: Namespace) -> bool:
    """Return whether Megatron's script has found a teacher, or a checkpoint of ModelOpt's."""
    names = ("modelopt_enabled", "export_kd_teacher_load")
    return any(getattr(args, name, None) for name in names)


def _has_evaluation_recipe(args: Namespace) -> bool:
    """Return whether a file of precisions names one for evaluation, outside a comment."""
    path = getattr(args, "te_precision_config_file", None)
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError):  # Megatron reports it when it builds the model
        return False
    return bool(re.search(r"^[^#\n]*\bevaluation_recipe\b", text, re.MULTILINE))
