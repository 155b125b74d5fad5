"""Evaluation: speak, hear, score, report. Import as `from eval.metrics import score_clip`.

A bare `import eval` shadows the builtin of that name; nothing is exported here so that nobody needs
to.
"""
