"""Results of a long study by key, in a file of JSON lines; and shares with their intervals."""

import json

from scipy import stats


class Lines:
    """Results by key in a file of JSON lines, which a resumed study reads."""

    def __init__(self, path):
        self.path, self.by_key = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.by_key[tuple(entry["key"])] = entry["result"]

    def once(self, key, compute, *inputs):
        """Return the result of `compute(*inputs)`, unless the file holds the result of this key."""
        if key not in self.by_key:
            self.add(key, compute(*inputs))
        return self.by_key[key]

    def add(self, key, result):
        """Keep a result, and write its line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")
        self.by_key[key] = result


def share(count, total):
    """Return a share of trials in percent with its exact binomial interval."""
    low, high = stats.binomtest(int(count), int(total)).proportion_ci()
    return f"{100 * count / total:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
