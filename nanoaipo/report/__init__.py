"""Table, figures and report.html of runs: `python -m nanoaipo.report out/RUN ...`."""
