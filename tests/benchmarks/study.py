"""Evidence for the rules of :mod:`lorafind.bases.selection`, as tables.

``python -m tests.benchmarks.study [--shared DIR] [--keep DIR] [TABLE …]`` prints all of worlds,
small, rules, growing, groups, joins, planted and published, or those named; ``--large`` adds
planted collections of 2,000 to 10,000. Nothing but FontBench is read; ``--keep`` saves the cosines
of its signatures, the one part that reads files.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tests.benchmarks import study_joins, study_planted, study_rules
from tests.benchmarks.study_data import load

TABLES = ("worlds", "small", "rules", "growing", "groups", "joins", "planted", "published")


def main() -> None:
    """Print the tables that were asked for."""
    default = Path(__file__).resolve().parents[3] / "shared"
    parser = argparse.ArgumentParser(description="Evidence for the number of components.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("LORAFIND_SHARED", default))
    )
    parser.add_argument("--keep", type=Path, help="a folder for the cosines of the signatures")
    parser.add_argument("--large", action="store_true", help="planted collections up to 10,000")
    asked = parser.parse_args()
    unknown = sorted(set(asked.tables) - set(TABLES))
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    wanted = asked.tables or TABLES
    if set(wanted) - {"planted", "published"}:
        data = load(asked.shared / "loras/fontbench", asked.keep)
    for table in wanted:
        if table == "worlds":
            study_rules.worlds_table(data)
        elif table == "small":
            study_rules.small_table(data)
        elif table == "rules":
            study_rules.rules_table(data)
        elif table == "growing":
            study_rules.rules_table(data, 0.92, all_rules=False)
        elif table == "groups":
            study_joins.groups_table(data)
        elif table == "joins":
            study_joins.joins_table(data)
        elif table == "planted":
            study_planted.planted_table(asked.large)
        else:
            study_planted.published_table()


if __name__ == "__main__":
    main()
