"""What each lesson costs and brings, in figures.

python tests/benchmarks/run.py [--quick] [--json FILE] [--svg FILE] [--lesson NN ...]

Measures on the server in DATABASE_URL, whose user must be allowed to create databases, or else on
an embedded Postgres in a temporary directory; in both cases in a database of its own, which is
dropped at the end. How cost grows is measured on the last of the lessons; --quick leaves that out,
and takes less than five minutes. --svg needs matplotlib: pip install -e '.[benchmark]'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import main

if __name__ == "__main__":
    main(__doc__)
