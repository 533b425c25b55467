"""Is every byte as it was written, and by whom?"""
