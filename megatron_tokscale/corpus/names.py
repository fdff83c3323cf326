"""Names that tell datasets apart, and which dataset of one list is which of another.

A dataset is known by its whole prefix. Its name, the last part of the prefix, is for people: many
corpora have `web/text_document`, `code/text_document`, ...
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from megatron_tokscale.core.errors import TokscaleError

_MOST = 4  # names in one line of a message


def whole_prefix(prefix: str) -> str:
    """Return the prefix as an absolute path; an empty one stays empty (not known)."""
    return os.path.normpath(Path(prefix).absolute()) if prefix else ""


def base_name(prefix: str) -> str:
    """Return the last part of a prefix."""
    return PurePath(prefix).name


def numbered(names: Sequence[str]) -> list[str]:
    """Return the names, each unique: namesakes become NAME#N, N their position in the list."""
    count = Counter(names)
    shown = [name if count[name] == 1 else f"{name}#{n}" for n, name in enumerate(names)]
    if len({*shown}) < len(shown):  # a name that looks like a number of another
        return [f"{name}#{n}" for n, name in enumerate(names)]
    return shown


def renamed(prefixes: Sequence[str], names: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """Return the names of some datasets as another list of datasets has them.

    Args:
        prefixes: of the datasets.
        names: of the datasets in their own list; kept where the other list does not have them.
        known: names in the other list by prefix.

    Returns:
        Unique names: a dataset whose name the other list gives to another has its prefix for one.
    """
    try:
        places = match_prefixes(prefixes, list(known), "the job's data")
    except TokscaleError:  # namesakes that cannot be told apart: neither list's numbers will do
        return list(prefixes)
    taken = list(known.values())
    found = [
        taken[place] if place is not None else prefix if name in taken else name
        for place, prefix, name in zip(places, prefixes, names, strict=True)
    ]
    return found if len({*found}) == len(found) else list(prefixes)


def listed(names: Sequence[str]) -> str:
    """Return the names for one line of a message: the first few, and how many more there are."""
    shown = ", ".join(names[:_MOST])
    return shown if len(names) <= _MOST else f"{shown} and {len(names) - _MOST} more"


def match_prefixes(wanted: Sequence[str], known: Sequence[str], of: str) -> list[int | None]:
    """Find each of some datasets among others, by their prefixes.

    The same prefix is the same dataset. Of other prefixes the last parts must be the same, the name
    at least: data may lie elsewhere on another machine, and the parts of per-split data lie in
    folders of their own. The longest common end counts, and it must be one of its kind in both
    lists.

    Args:
        wanted: prefixes, or names where no more is known.
        known: likewise.
        of: says what the known datasets are of, for the message.

    Returns:
        For each wanted dataset its position in `known`; None where it is not there.

    Raises:
        TokscaleError: namesakes cannot be told apart.
    """
    nearest_known, nearest_wanted = _Nearest(known), _Nearest(wanted)
    order: list[int | None] = []
    for position, prefix in enumerate(wanted):
        found = nearest_known(prefix)
        if PurePath(prefix).is_absolute() and found and known[found[0]] == prefix:
            order.append(found[0])
            continue
        back = {w for k in found for w in nearest_wanted(known[k])}
        if nearest_wanted.first[position] not in back:
            order.append(None)
        elif len(found) > 1 or len(back) > 1:
            raise TokscaleError(
                f"dataset {prefix} cannot be told from its namesakes: {of} has "
                f"{listed([known[k] for k in found])}; expected the same prefix in both; use the "
                "same paths, or give the files names of their own"
            )
        else:
            order.append(found[0])
    return order


class _Nearest:
    """Finds the prefixes of a list that have the longest end in common with another.

    Attributes:
        first: for each the position at which the same whole prefix comes first.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        places: dict[str, int] = {}
        self.first = [
            places.setdefault(prefix, position) if PurePath(prefix).is_absolute() else position
            for position, prefix in enumerate(prefixes)
        ]
        self._ends = [PurePath(prefix).parts[::-1] for prefix in prefixes]
        self._of_name: dict[str, list[int]] = defaultdict(list)
        for position, end in enumerate(self._ends):
            if self.first[position] == position:
                self._of_name[end[0] if end else ""].append(position)

    def __call__(self, prefix: str) -> list[int]:
        """Return their positions; none where no prefix has the same name."""
        end = PurePath(prefix).parts[::-1]
        candidates = self._of_name.get(end[0] if end else "", [])
        lengths = [_common(end, self._ends[position]) for position in candidates]
        return [
            position
            for position, length in zip(candidates, lengths, strict=True)
            if length == max(lengths)
        ]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length
