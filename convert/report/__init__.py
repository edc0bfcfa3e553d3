"""The report of a run: its page, its tables, its model card, its facts."""
