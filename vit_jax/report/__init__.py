"""report.html: one self-contained page about a run, an evaluation or several runs.

`build.py` puts the sections together. `page.py` renders `report.html.jinja` with `report.css` and
`report.js`. Jinja2 and Bokeh are imported when a page is made, and at no other time.
"""
