"""Tools that every room uses: errors, files, numbers, text, processes. It knows nothing of models or dictionaries."""
