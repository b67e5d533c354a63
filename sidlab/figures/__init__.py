"""What figures and tables look like, for research and course."""

from sidlab.checks import from_extra

# Asked for here, so that whatever of this room is imported, an error names the extra.
with from_extra("course"):
    import plotly  # noqa: F401
