"""What a run shows of itself: console, metric files, comparison table, HTML report."""

from jaxdistill.report.console import ProgressLine as ProgressLine
from jaxdistill.report.html import build as build
from jaxdistill.report.story import write_story as write_story
from jaxdistill.report.table import by_teacher as by_teacher
from jaxdistill.report.table import comparison_table as comparison_table
from jaxdistill.report.table import html_table as html_table
from jaxdistill.report.table import recovered as recovered
from jaxdistill.report.writers import MetricsWriter as MetricsWriter
from jaxdistill.report.writers import SilentWriter as SilentWriter
from jaxdistill.report.writers import read_metrics as read_metrics
