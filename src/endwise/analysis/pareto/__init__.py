"""Share of the model that each method keeps, against its number of active features."""
