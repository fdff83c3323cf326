"""Agreement of all ranks on the past of the run that their job resumes."""

import json
from dataclasses import replace

from megatron.training import print_rank_0

from megatron_tokscale.core.errors import AgreedError
from megatron_tokscale.probe import ProbeSchedule
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.history.launches import launch_of_job
from megatron_tokscale.training.history.past import Past
from megatron_tokscale.training.history.reckon import RECKONED, past_of_job
from megatron_tokscale.training.history.saved import SavedCheckpoint
from megatron_tokscale.training.probe.probe_store import ProbeStore
from megatron_tokscale.training.ranks import first_of_all_ranks, together
from megatron_tokscale.training.versions import installed_versions


def agree_on_past(
    state: TrainingState, saved: SavedCheckpoint | None, store: ProbeStore, schedule: ProbeSchedule
) -> Past:
    """Return the past of the run, with this job's launch as the last; all ranks call it.

    The rank that writes finds the past, and sends it to the others.

    Args:
        state: state of the training at the job's start.
        saved: content of the checkpoint that the job has loaded.
        store: the run directory.
        schedule: the probe schedule.

    Raises:
        AgreedError: the run directory cannot be read; or the schedule counts tokens, and the number
            of consumed tokens is unknown.
    """

    def find() -> str:
        known = (store.record(state.step), store.launches())
        past = past_of_job(state.step, state.consumed_samples, saved, *known)
        launch = launch_of_job(
            state.args,
            state.scheduler,
            state.optimizer,
            past,
            schedule=schedule.spec,
            versions=installed_versions(),
        )
        return json.dumps(replace(past, launches=(*past.launches, launch)).to_json())

    text = first_of_all_ranks(together(find, where=store.is_writer))
    past = Past.from_json(json.loads(text or "null"))
    if past.tokens is None and schedule.in_tokens:
        raise AgreedError(
            f"--tokscale-probe-schedule {schedule.spec} counts tokens, and the number consumed by "
            f"step {state.step} is unknown: the checkpoint does not hold it; give a "
            "schedule in steps"
        )
    _say_if_reckoned(past)
    return past


def _say_if_reckoned(past: Past) -> None:
    """Print the origin of a run's past, unless the plugin itself counted it."""
    is_known = past.tokens is not None and past.lr_sum is not None
    if past.step == 0 or (is_known and past.source != RECKONED):
        return
    tokens = "unknown" if past.tokens is None else str(past.tokens)
    lr_sum = "unknown" if past.lr_sum is None else f"{past.lr_sum:g}"
    source = past.source if past.source == RECKONED else "the checkpoint's settings do not tell"
    print_rank_0(
        f"tokscale: before step {past.step}: consumed tokens {tokens}, summed learning rate "
        f"{lr_sum} ({source})"
    )
