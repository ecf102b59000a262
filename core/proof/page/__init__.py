"""The page of a run (`--page`): one file, English and Chinese, light and dark, to be opened anywhere or printed.

Python hands over numbers as JSON and fills in texts and tables (Jinja2); what is drawn is drawn by the scripts in
`static/`, which the explorers (`pipeline.explore`, `cluster.explore`) share.
"""
