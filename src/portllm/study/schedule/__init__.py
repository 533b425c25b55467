"""Which steps of a study are done, and who does the rest."""
