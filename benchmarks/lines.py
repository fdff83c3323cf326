"""Results of a resumable study: one JSON line per finished repetition."""

import json


class Lines:
    """Results by key in a file of JSON lines, which a resumed study reads."""

    def __init__(self, path):
        self.path, self.by_key = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.by_key[tuple(entry["key"])] = entry["result"]

    def once(self, key, compute):
        """Return the result of this key, computed unless the file holds it."""
        if key not in self.by_key:
            result = compute()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
            self.by_key[key] = result
        return self.by_key[key]
