"""The page `report.html`: everything that one run has to show, or several runs side by side."""
