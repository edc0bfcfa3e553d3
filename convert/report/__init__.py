"""The report of a run: page, tables, pictures, model card, facts."""
