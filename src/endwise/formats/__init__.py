"""SAE files of the field, one format a file."""
