"""What the plugin refuses, and why: better no number than a wrong one."""

from argparse import Namespace

from megatron_tokscale.errors import TokscaleError

# Megatron argument -> (values it may have, its flag, why other values are refused)
_PROBE_NEEDS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "sft": ((False,), "--sft", "packed fine-tuning batches are not sequences of the probe set"),
    "dataloader_inter_document_masking": (
        (False,),
        "--dataloader-inter-document-masking",
        "the probe set is not packed",
    ),
    "hybrid_context_parallel": (
        (False,),
        "--hybrid-context-parallel",
        "its batches have another layout",
    ),
    "perform_rl_step": ((False,), "--perform-rl-step", "the probe is for pre-training"),
    "use_megatron_fsdp": ((False,), "--use-megatron-fsdp", "its isolation is not verified"),
    "use_torch_fsdp2": ((False,), "--use-torch-fsdp2", "its isolation is not verified"),
    "moe_router_force_load_balancing": (
        (False,),
        "--moe-router-force-load-balancing",
        "its random routing makes the losses noise",
    ),
    "moe_expert_rank_capacity_factor": (
        (None,),
        "--moe-expert-rank-capacity-factor",
        "its overflow handling wraps the forward pass",
    ),
    "cuda_graph_impl": (
        ("none", "transformer_engine", None),
        "--cuda-graph-impl",
        "a captured training graph would be replayed, dropout and all",
    ),
    "logits_load_dir": ((None,), "--logits-load-dir", "distillation replaces the loss"),
    "fp8_recipe": (
        ("tensorwise", "blockwise", "mxfp8", "custom", None),
        "--fp8-recipe delayed",
        "the probe would leave its amax in the scaling history",
    ),
}


def check_probe(args: Namespace) -> None:
    """Refuse settings under which a probe would disturb training or give wrong losses.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    for name, (allowed, flag, reason) in _PROBE_NEEDS.items():
        if name == "fp8_recipe" and not getattr(args, "fp8", None):
            continue
        if getattr(args, name, allowed[0]) not in allowed:
            raise TokscaleError(f"the probe does not support {flag}: {reason}")


def check_plan(args: Namespace) -> None:
    """Refuse settings under which a data plan cannot be followed.

    Raises:
        TokscaleError: naming the flag and the reason.
    """
    if args.dataloader_type not in (None, "single"):
        raise TokscaleError(
            f"--tokscale-plan needs --dataloader-type single, not {args.dataloader_type}: only "
            "then is sample k the k-th sample of the job"
        )
    if getattr(args, "phase_transition_iterations", None):
        raise TokscaleError(
            "--tokscale-plan replaces --phase-transition-iterations: put the change into the plan"
        )
    for name, flag in (
        ("mock_data", "--mock-data"),
        ("fim_data", "--fim-data"),
        ("sft", "--sft"),
        ("dataloader_fast_cache_load", "--dataloader-fast-cache-load"),
    ):
        if getattr(args, name, False):
            raise TokscaleError(f"--tokscale-plan does not support {flag}")
