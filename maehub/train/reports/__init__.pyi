from .report import update_report as update_report
