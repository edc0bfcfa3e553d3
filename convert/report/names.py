"""Names of what a report is made of: its files, its folder of model cards."""

from __future__ import annotations

HTML_NAME = "report.html"
JSON_NAME = "report.json"
CARD_NAME = "README.md"
CARDS_NAME = "cards"
