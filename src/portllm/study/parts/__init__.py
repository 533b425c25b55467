"""The kinds of work in a study besides training and scoring."""
