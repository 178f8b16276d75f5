"""The last lesson beside other engines on Postgres, with the same tasks.

python tests/benchmarks/peers.py [--json FILE] [--rounds N] [--only NAME ...]

Needs them installed, best in a virtual environment of its own: pip install -e '.[peers]'. Each
measurement is a process and a database of its own, in turns on one server: that in DATABASE_URL,
whose user must be allowed to create databases, or else an embedded Postgres in a temporary
directory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peer.command import main

if __name__ == "__main__":
    main(__doc__)
