"""Names of a report's files and of its folder of cards."""

from __future__ import annotations

HTML_NAME = "report.html"
JSON_NAME = "report.json"
CARD_NAME = "README.md"
CARDS_NAME = "cards"
