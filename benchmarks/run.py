"""``make bench``: the daemon beside its peers, as one table and one JSON file. See ``benchmarks/README.md``.

Nothing heavy is imported at the top: a spawned peer's worker imports this file again as its main module.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    for _folder in (str(ROOT / "client"), str(ROOT)):
        if _folder not in sys.path:
            sys.path.insert(0, _folder)
    from benchmarks.command import main

    sys.exit(main(sys.argv[1:]))
