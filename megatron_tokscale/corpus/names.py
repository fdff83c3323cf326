"""Unique names of datasets, and the matching of one list of datasets to another.

A dataset is known by its whole prefix. Its name, the last part of the prefix, is for people: many
corpora have `web/text_document`, `code/text_document`, ...
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from megatron_tokscale.core.errors import TokscaleError

_MOST_NAMES = 4  # names shown in one line of a message


def whole_prefix(prefix: str) -> str:
    """Return the prefix as an absolute path; an empty one, which is unknown, stays empty."""
    return os.path.normpath(Path(prefix).absolute()) if prefix else ""


def base_name(prefix: str) -> str:
    """Return the last part of a prefix."""
    return PurePath(prefix).name


def numbered(names: Sequence[str]) -> list[str]:
    """Return unique names: namesakes become NAME#N, N their position in the list."""
    count = Counter(names)
    shown = [name if count[name] == 1 else f"{name}#{n}" for n, name in enumerate(names)]
    if len({*shown}) < len(shown):  # a dataset is named like another one with its number
        return [f"{name}#{n}" for n, name in enumerate(names)]
    return shown


def renamed(prefixes: Sequence[str], names: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """Return the names of some datasets as another list of datasets has them.

    Args:
        prefixes: prefixes of the datasets.
        names: names of the datasets in their own list; kept for those that the other list lacks.
        known: names in the other list, by prefix.

    Returns:
        Unique names: a dataset whose name the other list gives to another one gets its prefix.
    """
    try:
        places = match_prefixes(prefixes, list(known), "the job's data")
    except TokscaleError:  # indistinguishable namesakes: the numbers of neither list would do
        return list(prefixes)
    taken = list(known.values())
    found = [
        taken[place] if place is not None else prefix if name in taken else name
        for place, prefix, name in zip(places, prefixes, names, strict=True)
    ]
    return found if len({*found}) == len(found) else list(prefixes)


def listed(names: Sequence[str]) -> str:
    """Return the first few names for one line of a message, and the number of the others."""
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


def match_prefixes(wanted: Sequence[str], known: Sequence[str], of: str) -> list[int | None]:
    """Return the position in `known` of each wanted dataset, matched by prefix.

    Equal prefixes are the same dataset. Two different ones are the same dataset if they have the
    longest common end, the name at least, of all pairs in both lists: data may lie elsewhere on
    another machine, and the parts of per-split data lie in folders of their own.

    Args:
        wanted: prefixes, or names where the prefix is not known.
        known: likewise.
        of: owner of the known datasets in the message, e.g. "the probe set".

    Returns:
        The position of each wanted dataset; None if it is not in `known`.

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
    """Lookup of the prefixes in a list that share the longest end with another prefix.

    Attributes:
        first: position of the first entry with the same whole prefix, for each entry.
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
        """Return the positions of the nearest prefixes; none where no prefix has the same name."""
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
