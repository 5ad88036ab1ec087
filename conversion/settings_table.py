"""Writes the table of accepted, ignored and refused settings into docs/conversion.md.

python conversion/settings_table.py
"""

from pathlib import Path

from transformers_parakeet.nemo.keys import settings_table

DOCUMENT = Path(__file__).parent.parent / "docs" / "conversion.md"
START, END = "<!-- settings: start -->\n", "<!-- settings: end -->\n"


def main() -> None:
    """Replace what stands between the two marks."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{settings_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
