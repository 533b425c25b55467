"""A patch in the form that a serving program takes, with nothing dropped in silence."""
