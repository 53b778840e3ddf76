"""The quantization report to look at: one picture, and one page that needs nothing else."""

from elutq.report_page.charts import report_figure
from elutq.report_page.levels import LevelHistogram, level_histograms
from elutq.report_page.page import report_page

__all__ = ["LevelHistogram", "level_histograms", "report_figure", "report_page"]
