"""The doctor's findings, for tests."""

from megatron_tokscale.doctor import doctor


def run_doctor(capsys, *words: str) -> tuple[int, dict[str, list[str]]]:
    """Run the doctor on a job's words; return its exit code, and its findings by state."""
    code = 0
    try:
        doctor.examine(words)
    except SystemExit as exit_:
        code = exit_.code
    found: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            state, _, text = line.strip().partition("  ")
            found.setdefault(state, []).append(text.strip())
    return code, found
