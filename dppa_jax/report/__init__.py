"""Tables, figures and pages of what was measured, like those of the paper."""
