"""The reasons for which a job with given flags would be refused, found without starting it.

Neither torch.distributed nor a GPU is needed: the flags are read by Megatron's own parser, and not
validated by it. Each check calls the function that the job calls. A check that needs the job's
processes, its checkpoint's arguments or files that are elsewhere is listed as not made. Nothing is
written.
"""

from argparse import Namespace
from collections.abc import Sequence

from megatron_tokscale import cpu
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.doctor.findings import Findings
from megatron_tokscale.doctor.plan_checks import check_plan
from megatron_tokscale.doctor.probe_checks import check_probe
from megatron_tokscale.training.gpt_flags import flag_refusals, megatron_parser
from megatron_tokscale.training.settings import JobSettings
from megatron_tokscale.training.support import SKIP_TRAIN


def check_flags(words: Sequence[str], *, is_own_script: bool = True) -> Findings:
    """Check the flags of a job, Megatron's and the plugin's, as its command line has them.

    Args:
        words: the flags.
        is_own_script: the job is `-m megatron_tokscale.pretrain`, not a script of the user's.
    """
    findings = Findings()
    parsed = findings.attempt(lambda: parse(words))
    if parsed is None:
        return findings
    args, unknown = parsed
    _check_unknown(unknown, findings, is_own_script=is_own_script)
    if is_own_script:
        findings.refused += flag_refusals(megatron_parser(), words)
    _check_devices(args, findings)
    settings = findings.attempt(lambda: JobSettings.from_args(args))
    if settings is None:
        return findings
    if not settings.has_part:
        findings.passed.append("no --tokscale-probe-set and no --tokscale-plan: nothing is wrapped")
    elif args.skip_train and not settings.replay:
        findings.warned.append(SKIP_TRAIN)
    else:
        _check_parts(settings, args, findings)
        if not is_own_script:
            findings.unchecked.append(
                "the script: its forward step must return the losses of the batch that it is given"
                + (", its datasets provider run on every rank" if settings.plan else "")
            )
    findings.unchecked.append(
        "Megatron's own validation of its flags, which needs the job's processes and devices"
    )
    return findings


def _check_parts(settings: JobSettings, args: Namespace, findings: Findings) -> None:
    """Check the probe and the plan that the flags request."""
    run = findings.attempt(lambda: settings.run)
    if settings.probe:
        check_probe(settings.probe, settings, run, args, findings)
    if settings.plan:
        check_plan(settings.plan, settings, run, args, findings)


def parse(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the parsed arguments, and the words that Megatron's parser does not recognise."""
    parser = megatron_parser()
    try:
        args, unknown = parser.parse_known_args(list(words))
    except (KeyError, AssertionError) as error:  # raised by Megatron's own readers of values
        raise TokscaleError(f"Megatron cannot read a value among the flags: {error!r}") from error
    args.seq_length = args.seq_length or getattr(args, "encoder_seq_length", None)
    return args, unknown


def _check_unknown(unknown: Sequence[str], findings: Findings, *, is_own_script: bool) -> None:
    """Refuse unknown --tokscale-* flags, and list flags that a user's script may add."""
    flags = [word for word in unknown if word.startswith("--")]
    ours = [flag for flag in flags if is_own_script or flag.startswith("--tokscale-")]
    findings.refused += [f"there is no flag {flag}" for flag in ours]
    others = [flag for flag in flags if flag not in ours]
    if others:
        findings.unchecked.append(
            f"{', '.join(others)}: not among this Megatron's flags, so the script must add them"
        )


def _check_devices(args: Namespace, findings: Findings) -> None:
    """Look for the devices that the job needs."""
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_on_cpu = args.tokscale_cpu or cpu.is_requested(())
    if is_on_cpu and n_devices:
        findings.refused.append(cpu.gpu_refusal(n_devices))
    if not is_on_cpu and not n_devices:
        findings.unchecked.append(f"a GPU: this machine has none, and {cpu.FLAG} is not given")
