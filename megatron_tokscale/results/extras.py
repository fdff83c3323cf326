"""The laws that `megatron-tokscale laws` fitted to a run."""

from typing import Any

from megatron_tokscale.core.checked import read_result
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.records import from_json
from megatron_tokscale.core.schemas import LAWS_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.fitted import check_identity
from megatron_tokscale.store import Run


def read_laws(run: Run, fit: FitSummary) -> dict[str, Any] | None:
    """Return the content of laws.json, of the fits in `fit`; None without such a file.

    Raises:
        TokscaleError: it is damaged, of another schema, or of other fits.
    """
    path = run.analysis / "laws.json"
    if not is_there(path):
        return None
    again = f"run `megatron-tokscale laws {run.path}` again, with the other runs if there were any"
    laws = read_result(path, LAWS_SCHEMA, again)
    identity = {name: laws.get(name) for name in vars(fit.identity)}
    check_identity(path, from_json(FitIdentity, identity), fit.identity, again)
    return laws
