"""The report of a log file: runs.py reads it, charts.py draws, page.py makes the HTML, picture.py the PNG."""
