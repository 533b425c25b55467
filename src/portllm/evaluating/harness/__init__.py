"""Tasks of lm-evaluation-harness: its prompts, its answers and its metrics, on models that are loaded here.

`package` is what is used of the harness; `local_rows` serves a task from files, `task` reads what the harness asks,
`scoring` lets it run a model, `source` is all of that as a study and a comparison ask for it.
"""
