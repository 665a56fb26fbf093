"""Evaluation: tasks, evaluators, verdicts, and ratios to the accuracy of the experts. See README.md in this folder."""
