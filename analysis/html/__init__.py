"""What all HTML pages share."""

from pathlib import Path

PALETTE = Path(__file__).parent / "palette.css"
"Colours and rules that reports and the page of `personatlas serve` share."
