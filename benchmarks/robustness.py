"""How mutated recipes, checkpoints, packages, data and runs end: the table of the campaign, or one of its cases again.

    python benchmarks/robustness.py --cases 1000     # of each kind of input: two tables, every distinct failure
    python benchmarks/robustness.py --cases 200 --kinds packages,recipes=5000 --seed 2
    python benchmarks/robustness.py --case 'recipes | check | recipe.yaml: set @7'    # what the command says

`tests/robustness/` says what is mutated, and what is held of every case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import get_args

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny
warnings.simplefilter("ignore")  # what libraries say of each other


def main() -> None:
    """Run the campaign or one case."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.robustness.campaign import Case, Runner, Table, campaign
    from tests.robustness.inputs import Kind

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each kind of input")
    parser.add_argument(
        "--kinds", default=",".join(get_args(Kind)), help="divided by commas, with =COUNT where it is another"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=Case.parse, help="this one alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        if options.case is not None:
            verdict, answer = runner.run(options.case)
            print(answer.output, answer.errors, answer.said, answer.traceback, verdict, sep="\n")
        else:
            table = Table()
            try:
                for each in options.kinds.split(","):
                    kind, _, count = each.partition("=")
                    start = time.monotonic()
                    campaign(runner, kind, int(count or options.cases), options.seed, table)
                    print(f"{kind}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            finally:  # an interrupted campaign has found something too
                print(table.markdown())
                print(table.report())
                print(*(f"late: {case}\n    {verdict.reason.strip()}" for case, verdict in table.late), sep="\n")
        runner.watched.close()


if __name__ == "__main__":
    main()
