"""The report of a run: its files read, turned into panels, and written as HTML and Markdown."""
